"""The generated parts of pages (docs/reliability.md unless told), each between two marks."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reliability.md"


def put(name: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between the marks of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = page.read_text().partition(begin)
    assert found, f"{page.name} has no {begin}"
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.partition(end)[2]}")
