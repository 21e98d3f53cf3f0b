"""Hooks of the documentation site (mkdocs.yml): pages that stand outside docs/, API pages, and links.

Documents link to each other and to files as they lie in the checkout, so that they read well there. On the
site a link to another page goes to that page and a link to a module to its API; a link to any other file
becomes plain text. A link to a file that does not exist fails `mkdocs build --strict` and tests/test_site.py.
"""

import ast
import json
import logging
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastgen"
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "assets/README.md": "assets.md",
    "fastgen/objectives/README.md": "methods-table.md",
    "tests/README.md": "tests.md",
}
"""documents outside docs/ -> their page"""
PICTURES = {"assets/figures/quickstart.png": "figures/quickstart.png"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)

log = logging.getLogger("mkdocs.hooks.site_pages")


def page_of(path: str) -> str:
    """The page or picture of the site that shows a file of the checkout; empty where none does."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("fastgen/") and path.endswith(".py") and path.count("/") > 1:
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return f"api/{module.split('.')[1]}.md#{module}"
    return OUTSIDE.get(path) or PICTURES.get(path, "")


def relink(text: str, origin: str) -> tuple[str, list[str]]:
    """Markdown of the file `origin` (path in the checkout) as its page shows it, and its dead links."""
    dead: list[str] = []
    here = posixpath.dirname(page_of(origin))

    def one(match: re.Match) -> str:
        picture, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if not (ROOT / path).exists():
            dead.append(target)
            return match.group()
        page = page_of(path)
        if not page:
            return label
        if anchor and "#" not in page:
            page += "#" + anchor
        return f"{picture}[{label}]({posixpath.relpath(page, here or '.')})"

    parts = FENCE.split(text)
    return "".join(p if p.startswith("```") else LINK.sub(one, p) for p in parts), dead


def documents() -> list[str]:
    """Every document of the site, by its path in the checkout."""
    guide = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
    return [p for p in OUTSIDE if (ROOT / p).is_file()] + guide


def rooms() -> list[str]:
    """Folders of the package."""
    return sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


def public_names(file: Path) -> list[str]:
    """What a module defines itself, imports left out."""
    names = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def api_page(room: str) -> str:
    """A room's docstring and its modules, one after the other."""
    files = [p for p in sorted((PACKAGE / room).rglob("*.py")) if not p.name.startswith("_")]
    modules = [
        f"::: {'.'.join(p.relative_to(ROOT).with_suffix('').parts)}\n"
        f"    options:\n      members: {json.dumps(public_names(p))}"
        for p in files
    ]
    about = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    return "\n\n".join([f"# fastgen.{room}", about, *modules]) + "\n"


def on_files(files, config):
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / path).read_text() for path, page in OUTSIDE.items() if (ROOT / path).is_file()}
    made |= {f"api/{room}.md": api_page(room) for room in rooms()}
    lines = [f"- [`fastgen.{room}`]({room}.md)" for room in rooms()]
    made["api/index.md"] = "\n".join(["# API", "", "One page for each room of the package.", "", *lines, ""])
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for path, picture in PICTURES.items():
        files.append(File.generated(config, picture, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the site needs them."""
    uri = page.file.src_uri
    if uri.startswith("api/"):
        return markdown
    origin = next((path for path, made in OUTSIDE.items() if made == uri), f"docs/{uri}")
    text, dead = relink(markdown, origin)
    for target in dead:
        log.warning("%s links to %s, which does not exist", origin, target)
    return text
