"""The documentation: no document links to what is not there, and the site builds without a warning."""

import subprocess
import sys

import pytest
import yaml

from tools.import_graph import ROOMS, ROOT
from tools.site_pages import documents, page_of, relink, rooms


@pytest.mark.parametrize("path", documents())
def test_no_document_has_a_dead_link(path):
    assert relink((ROOT / path).read_text(), path)[1] == []


def test_links_lead_where_the_site_has_the_page():
    text = "[a](CONTRIBUTING.md) [b](fastgen/core/errors.py) [c](LICENSE) [d](https://x.org) [e](gone.md)"
    shown, dead = relink(text, "README.md")
    assert shown == (
        "[a](contributing.md) [b](api/core.md#fastgen.core.errors) c [d](https://x.org) [e](gone.md)"
    )
    assert dead == ["gone.md"]
    deeper, dead = relink("[x](../../README.md#use) ![p](../figures/rooms.svg)", "docs/decisions/index.md")
    assert deeper == "[x](../index.md#use) ![p](../figures/rooms.svg)" and dead == []
    assert relink("```\n[x](gone.md)\n```", "README.md")[1] == [], "code is no link"


def test_every_page_and_room_is_in_the_navigation():
    def leaves(entry):
        if isinstance(entry, dict):
            return [leaf for value in entry.values() for leaf in leaves(value)]
        return [leaf for item in entry for leaf in leaves(item)] if isinstance(entry, list) else [entry]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(listed) == len(set(listed))
    api = {"api/index.md", *(f"api/{room}.md" for room in rooms())}
    assert set(listed) == {page_of(path) for path in documents()} | api
    assert set(rooms()) == set(ROOMS)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site/index.html").read_text()
    assert "fonts.googleapis.com" not in home
    assert (tmp_path / "site/figures/quickstart.png").is_file()
    assert "fastgen.core.errors.UserError" in (tmp_path / "site/api/core/index.html").read_text()
