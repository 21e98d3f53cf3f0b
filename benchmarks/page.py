"""The generated parts of docs/reliability.md, each between two marks."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reliability.md"


def put(name: str, text: str) -> None:
    """Replace what stands between the marks of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = PAGE.read_text().partition(begin)
    assert found, f"{PAGE.name} has no {begin}"
    PAGE.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.partition(end)[2]}")
