"""The house keeps its shape: rooms in their order, no circles, sizes, ASCII, a light import."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for d in ("fastgen", "eval", "benchmarks", "tests") for p in (ROOT / d).rglob("*.py"))
PACKAGE = [p for p in SOURCES if p.is_relative_to(ROOT / "fastgen")]
METHODS = sorted(p for p in (ROOT / "fastgen/objectives").glob("*.py"))
ROOMS = (
    "core",
    "diffusion",
    "families",
    "networks",
    "data",
    "roles",
    "sampling",
    "objectives",
    "config",
    "export",
    "evaluation",
    "training",
    "cli",
)
"""from the lowest up: a room imports those before it and itself, never one behind it"""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(p): p for p in PACKAGE}


def imports(path: Path) -> set[str]:
    """Dotted names of every import in a file, at any depth: the module where one is meant."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if module.startswith("fastgen.") else ""


def upward(path: Path) -> list[str]:
    """Imports of a module that go to a higher room."""
    own = ROOMS.index(room_of(name_of(path)))
    rooms = {m: room_of(m) for m in imports(path) if room_of(m)}
    return sorted(m for m, room in rooms.items() if ROOMS.index(room) > own)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a directed graph, or an empty list."""
    done: set[str] = set()

    def follow(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for child in sorted(graph.get(node, ())):
            if found := follow(child, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := follow(node, []))), [])


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_module_imports_a_higher_room(path):
    if path.parent == ROOT / "fastgen":
        assert name_of(path) == "fastgen", f"{path.name} stands in the hall: give it a room"
        return
    assert upward(path) == []


def test_no_circle_of_imports_lazy_ones_included():
    assert circle({m: imports(p) & set(MODULES) - {m} for m, p in MODULES.items()}) == []


def test_a_circle_and_an_upward_import_are_found(tmp_path, monkeypatch):
    """The negative: the two checks see what they are for."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    low = ROOT / "fastgen/core/errors.py"
    monkeypatch.setitem(globals(), "imports", lambda path: {"fastgen.cli.train", "fastgen.core.rng"})
    assert upward(low) == ["fastgen.cli.train"]


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


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_the_package_stands_alone(path):
    """It never imports what is not in the wheel."""
    assert not {m.split(".")[0] for m in imports(path)} & {"eval", "tests", "benchmarks"}


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
