"""What the documents name exists: paths, modules and commands; what pyproject.toml promises is used."""

import ast
import functools
import importlib.machinery
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from fastgen.config.sections import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "assets", "configs", "fastgen", "tests", "examples", "eval", "benchmarks")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SUFFIXES = (
    ".py",
    ".md",
    ".yaml",
    ".json",
    ".jsonl",
    ".npz",
    ".html",
    ".toml",
    ".txt",
    ".png",
    ".safetensors",
)
WRITTEN = (
    "runs",
    "out",
    "config.yaml",
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "samples",
    "checkpoints",
    "export",
)
WRITTEN += (
    "results.json",
    "report",
    "comfyui.json",
    "tile_masks.json",
    "state.json",
    "state.safetensors",
    "checksums.json",
    "dist",
    "_data",
)
"""what a run or a build writes: a path that begins with one of these is in no checkout"""
EXAMPLES = ("my", "..", "run.yaml", "metadata.jsonl")
"""what a reader's own files may be called: a path that begins with one of these is only an example"""
HUB_IDS = {
    found[1]
    for file in (ROOT / "configs/teachers").glob("*.yaml")
    if (found := re.search(r"path: ([\w.-]+/[\w.-]+)", file.read_text()))
}
"""released models, which look like paths"""
HISTORY = "CHANGELOG.md"  # may name what is gone
RECORDING = "first_hour.md"
"""names the files of the folder that a user works in"""


def shown(document: Path) -> str:
    return str(document.relative_to(ROOT))


def quoted(text: str) -> list[str]:
    """Everything a document sets as code: fenced blocks without their comments, and backticked spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.S | re.M)
    return [re.sub(r"(^|\s)#.*", "", block) for block in blocks] + re.findall(r"`([^`]+)`", rest)


def path_like(word: str) -> str | None:
    """The path that a word of code names, if it names one.

    That is a word of path characters with a known file suffix, or with a slash and a first part in lower
    case. Parts in capitals (NAME, FILE, N) are placeholders and become *; what a run writes and what is named
    as an example is none.
    """
    word = word.strip("\"'(),;:").removeprefix("./").removeprefix("assets:")
    if not re.fullmatch(r"[\w.{},*+-]+(/[\w.{},*+-]+)*/?", word) or word.startswith(("-", "*")):
        return None
    first = word.split("/")[0]
    if word in HUB_IDS:
        return None
    if first in WRITTEN + EXAMPLES or not ("/" in word or Path(word).suffix in SUFFIXES):
        return None
    if "/" in word and not Path(word).suffix and not re.fullmatch(r"[a-z_.]+", first):
        return None
    return re.sub(r"\b[A-Z]+\b", "*", word)


def expand(path: str) -> list[str]:
    """a/{b,c}/d as a/b/d and a/c/d."""
    found = re.search(r"\{([^}]*)\}", path)
    if not found:
        return [path]
    return [
        whole
        for part in found[1].split(",")
        for whole in expand(path[: found.start()] + part + path[found.end() :])
    ]


def exists(path: str, beside: Path) -> bool:
    """Whether a path is found from the root, from assets/, beside the document; a bare name anywhere."""
    path = path.rstrip("/")
    if any(any(True for _ in base.glob(path)) for base in (ROOT, ROOT / "assets", beside)):
        return True
    return "/" not in path and any(any(True for _ in (ROOT / f).rglob(path)) for f in FOLDERS)


def missing(text: str, beside: Path) -> list[str]:
    """Paths that a document names, as code or as a link, and that are not there."""
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    links = [x for x in links if not re.match(r"[a-z]+:", x) and not (beside / x).exists()]
    named = [path for code in quoted(text) for word in code.split() if (path := path_like(word))]
    return links + [path for path in named if not all(exists(p, beside) for p in expand(path))]


def commands(text: str) -> list[str]:
    """Modules that `python -m` runs, and dotted names of this repository, set as code."""
    run = [m for code in quoted(text) for m in re.findall(r"python3? -m ([\w.]+)", code)]
    whole = [code for code in quoted(text) if re.fullmatch(r"(fastgen|eval|benchmarks|tests)(\.\w+)+", code)]
    return run + [code for code in whole if Path(code).suffix not in SUFFIXES]


def unknown_tasks(text: str) -> list[str]:
    """What documents give `python -m eval` and `python -m benchmarks` to do (a|b: either) and they cannot."""
    named = [
        m for code in quoted(text) for m in re.findall(r"python -m (?:eval|benchmarks) ([a-z][\w|]*)", code)
    ]
    words = {
        node.value
        for file in ("eval/__main__.py", "fastgen/cli/evaluate.py", "benchmarks/__main__.py")
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return [task for tasks in named for task in tasks.split("|") if task not in words]


def extras() -> set[str]:
    """Packages of the optional extras: a document may call one that is not installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    return {re.split(r"[^\w.-]", line)[0] for line in lines}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, an attribute of one, or a package of an extra."""
    if name in extras():
        return True
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        pass
    head, _, tail = name.rpartition(".")
    try:
        return bool(head) and hasattr(importlib.import_module(head), tail)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown)
def test_every_path_named_in_a_document_exists(document):
    if document.name not in (HISTORY, RECORDING):
        assert missing(document.read_text(), document.parent) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown)
def test_every_module_named_in_a_document_exists(document):
    if document.name != HISTORY:
        text = document.read_text()
        assert [name for name in commands(text) if not resolves(name)] == []
        assert unknown_tasks(text) == []


def test_what_is_not_there_is_found():
    """The negative: names that are gone, in each form a document can write them."""
    text = (
        "see [this](docs/gone.md) and `fastgen/gone.py`, `gone.yaml`, `configs/gone/NAME.yaml` and\n"
        "`measure/{digits,gone}/`, `python -m fastgen.gone`, `fastgen.core.gone`\n"
        "```bash\npython gone.py  # with/a/comment\n```\n"
        "`python -m eval gone`, `python -m benchmarks memory|lost`,\n"
        "but [that](README.md#use), `runs/gone/export`, `configs/recipes/NAME.yaml`, `fastgen.core.rng`"
    )
    gone = ["docs/gone.md", "gone.py", "fastgen/gone.py", "gone.yaml", "configs/gone/*.yaml"]
    assert missing(text, ROOT) == [*gone, "measure/{digits,gone}/"]
    assert [name for name in commands(text) if not resolves(name)] == ["fastgen.gone", "fastgen.core.gone"]
    assert unknown_tasks(text) == ["gone", "lost"]


def test_no_document_names_where_it_was_written():
    for document in DOCUMENTS:
        assert not re.search(r"(?<![\w.])/(work|tmp|home|root|opt)/", document.read_text()), document


# -- dependencies -----------------------
MODULES = {  # distribution: what is imported, where the names differ
    "open-clip-torch": "open_clip",
    "pillow": "PIL",
    "pymcubes": "mcubes",
    "pyyaml": "yaml",
    "torch-fidelity": "torch_fidelity",
}
THROUGH_OTHERS = {"ftfy", "imageio-ffmpeg"}  # of diffusers for the prompts of Wan, of imageio for mp4
CONTRIBUTORS = {"real", "test", "dev", "docs"}  # extras for work on fastgen itself


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


@functools.cache
def imported() -> set[str]:
    """Top-level packages that fastgen imports, at any depth."""
    found = set()
    for path in (ROOT / "fastgen").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    return found


def unused(requirements: list[str]) -> list[str]:
    """Packages of these that no module of fastgen imports; accelerate imports the trackers by name."""
    trackers = set(str(TrainConfig.model_fields["report_to"].annotation).split("'"))
    names = [name_of(line) for line in requirements]
    return [n for n in names if MODULES.get(n, n) not in imported() | trackers | THROUGH_OTHERS]


def test_every_dependency_is_used():
    assert unused(PROJECT["dependencies"]) == []
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra not in CONTRIBUTORS:
            assert unused(requirements) == [], extra
    assert unused(["streamlit>=1", "torch"]) == ["streamlit"]


def lowest_versions():
    """The script .ci/lowest as a module."""
    loader = importlib.machinery.SourceFileLoader("lowest", str(ROOT / ".ci" / "lowest"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("lowest", loader))
    loader.exec_module(module)
    return module.lowest


def test_every_dependency_has_a_lowest_version():
    pins = lowest_versions()(PROJECT)
    assert len(pins) == len(PROJECT["dependencies"]) + len(PROJECT["optional-dependencies"]["test"])
    assert "torch==2.14" in pins
    with pytest.raises(SystemExit, match="numpy has no lower bound"):
        lowest_versions()({"dependencies": ["numpy"], "optional-dependencies": {"test": []}})


def test_the_recorded_versions_are_allowed():
    """constraints.txt names one exact version for each dependency, at or above its lower bound."""
    from packaging.version import Version

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    found = {name_of(line): Version(line.split("==")[1]) for line in lines}
    for pin in lowest_versions()(PROJECT, extras=()):
        assert found[name_of(pin)] >= Version(pin.split("==")[1]), pin


# -- image -------------------------------
def test_the_image_is_built_from_what_a_wheel_needs():
    """Every input of the wheel is copied, each copied path exists, and extras and command are ours."""
    text = (ROOT / "Dockerfile").read_text()
    copied = {path for line in re.findall(r"^COPY (.*)", text, re.M) for path in line.split()[:-1]}
    assert all((ROOT / path).exists() for path in copied), copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed | {*wheel["packages"], *wheel["force-include"]} == copied
    extras = re.search(r"^ARG EXTRAS=(.*)", text, re.M).group(1).split(",")
    assert set(extras) <= project["project"]["optional-dependencies"].keys()
    assert re.search(r'^ENTRYPOINT \["(.*)"\]', text, re.M).group(1) in project["project"]["scripts"]
