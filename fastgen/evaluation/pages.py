"""Self-contained HTML from the templates in assets/: everything inside, nothing loaded from elsewhere."""

from fastgen.core.paths import asset
from fastgen.export.markdown import shown_lines

LIVE_SECONDS = 15
"""after which the page of a run that goes on loads itself again"""


def render(name: str, **values: object) -> str:
    """A page from a template of assets/. Values are text: escaped, and without the characters that hide or
    reorder others.
    """
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(asset(name).parent, encoding="utf-8")
    page = Environment(loader=loader, autoescape=True, trim_blocks=True, finalize=_without_hidden)
    return page.get_template(name).render(live_seconds=LIVE_SECONDS, **values)


def _without_hidden(value: object) -> object:
    return shown_lines(value) if type(value) is str else value
