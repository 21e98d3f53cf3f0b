"""The house keeps its shape: rooms in their order, no cycles, sizes, ASCII, a light import."""

import ast
import json
import subprocess
import sys
import time

import pytest

from tools.import_graph import (
    FIGURE,
    PURPOSE,
    ROOMS,
    ROOT,
    behind,
    counts,
    cycle,
    drawn,
    imports,
    module_graph,
    name_of,
    places,
    room_graph,
    room_of,
    svg,
    upward,
)

FOLDERS = ("fastgen", "eval", "benchmarks", "tests", "tools")
SOURCES = sorted(p for d in FOLDERS for p in (ROOT / d).rglob("*.py"))
PACKAGE = [p for p in SOURCES if p.is_relative_to(ROOT / "fastgen")]
METHODS = sorted(p for p in (ROOT / "fastgen/objectives").glob("*.py"))


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_module_imports_a_higher_room(path):
    if path.parent == ROOT / "fastgen":
        named = name_of(path) in ("fastgen", "fastgen.__main__")  # python -m fastgen
        assert named, f"{path.name} is in no room: move it into one"
        return
    assert upward(name_of(path), imports(path)) == []


def test_no_cycle_of_imports_lazy_ones_included():
    assert cycle(module_graph()) == []


def test_a_cycle_and_an_upward_import_are_found():
    """The negative: the two checks see what they are for."""
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert upward("fastgen.core.errors", {"fastgen.cli.train", "fastgen.core.rng"}) == ["fastgen.cli.train"]
    found = room_graph({"fastgen.core.errors": {"fastgen.cli.train"}, "fastgen.cli.train": set()})
    assert found["core"] == {"cli"} and not found["cli"]


def test_the_house_stays_small():
    found = counts()
    assert found["rooms"] == len(ROOMS) <= 20
    assert found["levels"] <= 10
    assert found["upward imports"] == found["cycles"] == 0


def test_the_picture_of_the_rooms_is_current():
    """docs/architecture.md shows it."""
    assert set(PURPOSE) == set(ROOMS)
    drawn = svg(room_graph(module_graph()))
    assert FIGURE.read_text() == drawn, "run python -m tools.import_graph --write"


def test_no_arrow_of_the_picture_runs_behind_a_box():
    graph = room_graph(module_graph())
    place = places(graph)
    assert not any(behind(place, *arrow) for arrow in drawn(graph))
    grid = {f"{x}{y}": (300.0 * x, 100.0 * y) for x in (0, 1) for y in (0, 1, 2)}
    assert behind(grid, "00", "02") == set()
    assert behind(grid, "10", "02"), "the negative: the way from corner to corner is not free"


def test_every_room_says_what_it_holds():
    folders = {p.parent for p in PACKAGE} - {ROOT / "fastgen"}
    assert {f.name for f in folders if f.parent == ROOT / "fastgen"} == set(ROOMS)
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_methods_see_no_framework_and_no_files(path):
    banned = {"accelerate", "diffusers", "peft", "transformers", "pathlib", "os", "safetensors"}
    assert not banned & {m.split(".")[0] for m in imports(path)}


def test_the_trainer_knows_no_method():
    path = ROOT / "fastgen/training/trainer.py"
    assert not any(m.startswith("fastgen.objectives") for m in imports(path))
    text = path.read_text()
    assert not any(f'"{p.stem}"' in text for p in METHODS)


WHOLE = {"RunConfig", "all_stages"}
"""names by which code reaches the whole config of a run"""


def reads_whole_config(path) -> set[str]:
    """The names of `WHOLE` in a file, as a name, an attribute or an import."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [getattr(node, key, None) for key in ("id", "attr")]
        names += [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        found |= WHOLE & {name for name in names if isinstance(name, str)}
    return found


def may_hold_config(module: str) -> bool:
    """Whether a module is one of those that the whole config of a run is for."""
    return room_of(module) in ("cli", "config") or module == "fastgen.training.assembly"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_config_is_passed_by_section(path):
    """The commands and `training/assembly.py` hold the config of a run; everything else gets its sections."""
    assert may_hold_config(name_of(path)) or not reads_whole_config(path)
    assert reads_whole_config(ROOT / "fastgen/training/assembly.py") == WHOLE, "the negative"


def test_no_other_module_reads_the_whole_config(tmp_path, tiny, monkeypatch):
    """The same of what is passed without a type, in a run from its command to its report."""
    from fastgen.cli.train import main
    from fastgen.config.run import RunConfig

    readers = set()

    def read(self, name):
        readers.add(sys._getframe(1).f_globals.get("__name__", ""))
        return object.__getattribute__(self, name)

    values = {
        "teacher": {"path": str(tiny("flow")), "num_steps": 2},
        "objective": {"name": "diff_instruct"},
        "data": {"name": "digits"},
        "train": {"max_train_steps": 1, "train_batch_size": 2, "validation_steps": 1},
        "eval": {"num_samples": 2, "validation_samples": 2, "grid": 2},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    run = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(RunConfig, "__getattribute__", read)
    assert main([*run, "--dry_run"]) == 0
    assert main(run) == 0
    ours = {module for module in readers if module.startswith("fastgen.")}
    assert "fastgen.training.assembly" in ours, "the negative: a module that reads it is seen"
    assert {module for module in ours if not may_hold_config(module)} == set()


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_the_package_stands_alone(path):
    """It never imports what is not in the wheel."""
    assert not {m.split(".")[0] for m in imports(path)} & {"eval", "tests", "benchmarks", "tools"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes_and_ascii(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "a file has at most 400 lines"
    assert text.isascii()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines; at most 60"


def test_no_pickles_in_the_product():
    """Published metric weights are .pt files: they are read by torch's own restricted reader alone."""
    for path in PACKAGE:
        text = path.read_text()
        assert "torch.save(" not in text and "pickle.load" not in text, path
        loads = [line for line in text.splitlines() if "torch.load(" in line]
        assert all("weights_only=True" in line for line in loads), path
        assert not loads or room_of(name_of(path)) == "evaluation", path


def test_import_is_quick_and_light():
    """`import fastgen` needs neither torch nor the libraries of other people's models."""
    code = "import sys, time; t = time.time(); import fastgen; print(time.time() - t); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.split("\n", 1)
    assert float(seconds) < 1.0
    assert not {"torch", "diffusers", "transformers", "accelerate", "peft"} & set(modules.split())


def test_public_names_resolve():
    import fastgen

    start = time.time()
    for name in fastgen.__all__:
        assert getattr(fastgen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        fastgen.Nothing  # noqa: B018
    assert time.time() - start < 30
