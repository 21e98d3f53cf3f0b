"""The house keeps its shape: import direction, sizes, plain ASCII, and an import that costs nothing."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for d in ("fastgen", "eval", "benchmarks", "tests") for p in (ROOT / d).rglob("*.py"))
OBJECTIVES = sorted((ROOT / "fastgen/objectives").glob("*.py"))
# module -> what it may import of fastgen; modules not named here may import anything below the trainer
MAY_IMPORT = {
    "fastgen.errors": (),
    "fastgen.rng": (),
    "fastgen.schedules": (),
    "fastgen.losses": ("schedules",),
    "fastgen.divergences": ("losses", "schedules"),
    "fastgen.tangents": ("backbones.attention", "errors"),
    "fastgen.coordinates": ("schedules",),
    "fastgen.roles": ("backbones.base", "codecs", "schedules"),
    "fastgen.critics": ("backbones.base", "roles"),
    "fastgen.samplers": ("schedules", "roles", "codecs", "backbones.base"),
}
OBJECTIVE_MAY = (
    "divergences",
    "errors",
    "ema",
    "losses",
    "objectives",
    "rng",
    "roles",
    "samplers",
    "schedules",
    "tangents",
    "coordinates",
)


def imports(path: Path) -> set[str]:
    """Dotted names of every import in a file, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_low_modules_import_nothing_above_them(module):
    found = imports(ROOT / (module.replace(".", "/") + ".py"))
    ours = {f.removeprefix("fastgen.") for f in found if f.startswith("fastgen")}
    assert ours <= set(MAY_IMPORT[module]), ours


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda p: p.stem)
def test_objectives_see_no_framework_and_no_files(path):
    found = imports(path)
    ours = {f.split(".")[1] for f in found if f.startswith("fastgen.")}
    assert ours <= set(OBJECTIVE_MAY), ours
    banned = {"accelerate", "diffusers", "peft", "transformers", "pathlib", "os", "safetensors"}
    assert not banned & {f.split(".")[0] for f in found}


def test_the_trainer_knows_no_method():
    found = imports(ROOT / "fastgen/trainer.py")
    assert not any(f.startswith("fastgen.objectives") for f in found)
    text = (ROOT / "fastgen/trainer.py").read_text()
    assert not any(f'"{p.stem}"' in text for p in OBJECTIVES)


def test_the_package_never_imports_tests_or_benchmarks():
    for path in (p for p in SOURCES if p.is_relative_to(ROOT / "fastgen")):
        assert not {f.split(".")[0] for f in imports(path)} & {"tests", "benchmarks"}, path


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes_and_ascii(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "a file has at most 400 lines"
    assert text.isascii()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines; at most 60"


def code_lines(paths, docstrings: bool = False) -> int:
    """Lines that are neither blank nor comments nor, unless counted, docstrings (those of fields too)."""
    total = 0
    for text in (p.read_text() for p in paths):
        code = {i for i, s in enumerate(map(str.strip, text.splitlines()), 1) if s and not s.startswith("#")}
        for node in ast.walk(ast.parse(text)):
            if (
                not docstrings
                and isinstance(node, ast.Expr)
                and isinstance(getattr(node.value, "value", None), str)
            ):
                code -= set(range(node.lineno, node.end_lineno + 1))
        total += len(code)
    return total


# what a family of methods needs beside its files in objectives/
METHODS = (
    "divergences",
    "tangents",
    "coordinates",
    "smooth",
    "sprint",
    "router",
    "join",
    "nasa",
    "imagetext",
)


def test_core_stays_small():
    """What every method and network shares; the wrapper and the tools of single methods are counted apart."""
    wrapper, own = ROOT / "fastgen/backbones", {ROOT / f"fastgen/{n}.py" for n in METHODS}
    core = [p for p in SOURCES if name_of(p).startswith("fastgen") and p not in OBJECTIVES]
    shared = [p for p in core if not p.is_relative_to(wrapper) and p not in own]
    assert code_lines(shared) <= 4500, code_lines(shared)
    assert code_lines(shared, docstrings=True) <= 5250
    assert code_lines(own) <= 550
    inside = [p for p in core if p.is_relative_to(wrapper)]
    declares = {p for p in inside if "\nFAMILIES" in p.read_text() and p.stem != "registry"}
    assert len(declares) >= 7 and code_lines(set(inside) - declares) <= 1200, code_lines(
        set(inside) - declares
    )
    assert all(len(p.read_text().splitlines()) <= 300 for p in declares), (
        "a file of declarations has 300 lines"
    )


def test_no_pickles_in_the_product():
    for path in (p for p in SOURCES if p.is_relative_to(ROOT / "fastgen")):
        text = path.read_text()
        assert "torch.save(" not in text and "pickle.load" not in text and "torch.load(" not in text, path


def test_import_is_quick_and_light():
    """`import fastgen` needs neither torch nor the libraries of other people's models."""
    code = "import sys, time; t = time.time(); import fastgen; print(time.time() - t); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.split("\n", 1)
    assert float(seconds) < 1.0
    assert not {"diffusers", "transformers", "accelerate", "peft"} & set(modules.split())


def test_public_names_resolve():
    import fastgen

    start = time.time()
    for name in fastgen.__all__:
        assert getattr(fastgen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        fastgen.Nothing  # noqa: B018
    assert time.time() - start < 30
