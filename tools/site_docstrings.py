"""Extension of the documentation site (mkdocs.yml): docstrings are plain text, so their layout is kept.

The first paragraph becomes running text; the rest, where algorithm boxes are, a block as it was written.
"""

import griffe


def plain(text: str) -> str:
    """Markdown that shows a docstring as it stands in the source."""
    first, _, rest = text.partition("\n\n")
    first = "".join("\\" + c if c in "\\`*_[]<>#|" else c for c in first)
    return f"{first}\n\n```text\n{rest}\n```" if rest.strip() else first


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
