"""python -m eval leaderboard --html: every result is a point, the page filters, and reads at any width."""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from eval.__main__ import main
from eval.evidence import read_all
from eval.gallery import points
from tests.support.browser import CHROMIUM, WIDER, browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "runs/tinted-sd_dmd2/samples").mkdir(parents=True)
    Image.new("RGB", (80, 40), "teal").save(folder / "runs/tinted-sd_dmd2/samples/student.png")
    assert main(["leaderboard", "--html", str(folder / "page.html"), "--runs", str(folder / "runs")]) == 0
    return folder / "page.html"


def data(page):
    text = page.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, flags=re.S)[1])


def test_every_result_is_a_point_with_the_mean_of_its_seeds(page):
    documents, found = read_all(), data(page)["points"]
    measured = [
        d for d in documents if {"fd_mini", "energy_distance"} & d["results"].get("student", {}).keys()
    ]
    assert {p["recipe"] for p in found} - {"teacher"} == {d["recipe"] for d in measured}
    own = [d["results"]["student"] for d in documents if d["recipe"] == "digits_dmd2"]
    point = next(p for p in found if p["recipe"] == "digits_dmd2")
    assert point["value"] == pytest.approx(sum(r["fd_mini"] for r in own) / len(own))
    assert point["seeds"] == len(own) > 1 and point["calls"] == own[0]["nfe"]
    assert [p["teacher"] for p in found if p["method"] == "teacher"] == list(
        dict.fromkeys(d["teacher"] for d in documents)
    )
    assert points([]) == []


def test_the_page_holds_all_it_needs(page):
    text = page.read_text()
    assert set(data(page)["pictures"]) == {"tinted-sd_dmd2"}
    assert not re.search(r'(src|href)="(?!data:)', text) and "@import" not in text


@pytest.mark.parametrize("argv", [("--html", "page.txt"), ("--html", "p.html", "--runs", "nowhere")])
def test_mistakes_are_one_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["leaderboard", *argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not any(tmp_path.iterdir())


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_browser_filters_and_never_scrolls_sideways(page):
    with browser() as open_page:
        for width in (1300, 400):
            tab, problems = open_page(page.as_uri(), width, 900)
            assert tab.evaluate(WIDER) == [], width
            if folder := os.environ.get("FASTGEN_SCREENSHOTS"):
                tab.screenshot(path=Path(folder) / f"leaderboard-{width}.png", full_page=True)
            rows, dots = tab.locator("tbody tr").count(), tab.locator("#by-calls circle").count()
            assert rows == dots > 20 and tab.locator("#pictures img").count() == 1
            tab.select_option("#method", "lcm")
            assert 1 < tab.locator("tbody tr").count() < rows
            assert set(tab.locator("tbody td:nth-child(2)").all_inner_texts()) <= {"lcm", "teacher"}
            tab.select_option("#teacher", "digits")
            assert tab.locator("#by-seconds circle").count() > 1 and tab.locator("#pictures img").count() == 0
            tab.locator("#by-calls circle").last.click()
            assert tab.locator("tr.on").count() == 1
            assert problems == []
