"""The pages built from evidence, configs and the tests that exist: fastgen/objectives/README.md, the guide,
configs/README.md and the README's picture of quality against speed.
"""

from pathlib import Path

from eval import catalogue, evidence, figure, orderings, studies
from eval.ladder import TESTS, choice, ladder
from eval.results_table import markdown, measured
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.core.paths import PACKAGE

README = PACKAGE / "objectives" / "README.md"
GUIDE = PACKAGE.parent / "docs" / "methods.md"
SKELETON = """# Objectives

One file per method. The tables below are written by `python -m eval leaderboard`; do not edit them by hand.

## Where each method stands

<!-- ladder:begin -->
<!-- ladder:end -->

## Measured

<!-- leaderboard:begin -->
<!-- leaderboard:end -->

## Published orderings

<!-- orderings:begin -->
<!-- orderings:end -->

## Drift while training

<!-- drift:begin -->
<!-- drift:end -->
"""


def _between(text: str, marker: str, body: str, page: str = "README.md") -> str:
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if begin not in text or end not in text:
        raise UserError("leaderboard", f"{page} lacks {begin} or {end}", "put both markers back")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"


def render(text: str, documents: list[dict], tests: Path = TESTS) -> str:
    """The README with its tables rebuilt."""
    text = _between(text, "ladder", ladder(documents, tests))
    text = _between(text, "leaderboard", measured(documents))
    table = markdown(orderings.HEADER, orderings.rows(documents, orderings.load_claims()))
    text = _between(text, "orderings", "\n".join(table))
    table = markdown(orderings.DRIFTS, orderings.drifts(documents))
    return _between(text, "drift", "\n".join(table))


def leaderboard(
    check: bool = False,
    readme: Path = README,
    folder: Path | None = None,
    tests: Path = TESTS,
    guide: Path | None = GUIDE,
    configs: Path | None = catalogue.PAGE,
    picture: Path | None = figure.FIGURE,
) -> list[str]:
    """Rewrite the tables, or with check only say what is out of date."""
    if not tests.is_dir():
        raise UserError("leaderboard", f"{tests} does not exist", "run it in a checkout")
    documents = evidence.read_all(folder)
    text = readme.read_text() if readme.is_file() else SKELETON
    pages = {readme: (text, render(text, documents, tests))}
    if guide is not None:
        before = guide.read_text()
        built = _between(before, "choice", choice(documents), guide.name)
        for marker, study in studies.TABLES.items():
            built = _between(built, marker, study(documents), guide.name)
        pages[guide] = (before, built)
    if configs is not None:
        before = built = configs.read_text()
        for marker, table in catalogue.TABLES.items():
            built = _between(built, marker, table(documents), "configs/README.md")
        pages[configs] = (before, built)
    if picture is not None:
        before = picture.read_text() if picture.is_file() else ""
        pages[picture] = (before, figure.svg(documents))
    if not check:
        for page, (_, built) in pages.items():
            write_text(page, built)
        return []
    problems = evidence.outdated(documents)
    for page, (before, built) in pages.items():
        if not page.is_file() or built != before:
            where = f"{page.parent.name}/{page.name}"
            problems.append(
                f"{where} differs from the evidence or the configs; run `python -m eval leaderboard`"
            )
    return problems
