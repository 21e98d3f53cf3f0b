"""python -m eval leaderboard --html: every result is a point, the page filters, and reads at any width."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval import figure
from eval.__main__ import main
from eval.evidence import read_all, results_folder
from eval.gallery import points
from eval.thumbnails import MOST_BYTES, write_thumbnail
from fastgen.evaluation.sample_grids import save_grid, save_requests
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
        d
        for d in documents
        if {"fd_mini", "energy_distance", "chamfer"} & d["results"].get("student", {}).keys()
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
    kept = {p.stem for p in results_folder().glob("*/*.webp")}
    assert set(data(page)["pictures"]) == {"tinted-sd_dmd2"} | kept and "tinted-sd_f_distill" in kept
    assert all(p.stat().st_size <= MOST_BYTES for p in results_folder().glob("*/*.webp"))
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
            kept = {"tinted-sd_dmd2"} | {p.stem for p in (results_folder() / "tinted-sd").glob("*.webp")}
            assert rows == dots > 20 and tab.locator("#pictures img").count() == len(kept)
            assert tab.locator("td img").count() >= 2
            tab.select_option("#method", "lcm")
            assert 1 < tab.locator("tbody tr").count() < rows
            assert set(tab.locator("tbody td:nth-child(2)").all_inner_texts()) <= {"lcm", "teacher"}
            tab.select_option("#teacher", "digits")
            assert tab.locator("#by-seconds circle").count() > 1 and tab.locator("#pictures img").count() == 0
            tab.select_option("#method", "f_distill")
            assert tab.locator("#pictures img").count() == 1
            tab.locator("#by-calls circle").last.click()
            assert tab.locator("tr.on").count() == 1 and "calls" in tab.locator("#chosen").inner_text()
            tab.locator("#pictures img").click()
            assert tab.locator("dialog").is_visible()
            assert problems == []


def test_a_picture_is_kept_beside_new_evidence(tmp_path):
    """The first rows, cut by the run's own layout, and never more than its bound."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 64, 64, generator=random)  # noise: the hardest to make small
    save_grid(images, tmp_path / "samples" / "student.png")
    save_requests(images, [""] * 40, tmp_path / "samples" / "requests.json")
    kept = write_thumbnail(tmp_path, tmp_path / "kept.webp")
    assert kept.stat().st_size <= MOST_BYTES
    with Image.open(kept) as picture:
        assert picture.width == pytest.approx(5 * picture.height, rel=0.02)
    assert write_thumbnail(tmp_path / "samples", tmp_path / "none.webp") is None


def test_the_picture_of_quality_against_speed():
    documents = read_all()
    found = figure.points(documents)
    assert len(found) > 20 and all(p.faster > 0 and p.ratio > 0 for p in found)
    best = figure.front(found)
    assert {min(found, key=lambda p: p.ratio), max(found, key=lambda p: p.faster)} <= set(best)
    assert all(a.faster < b.faster and a.ratio < b.ratio for a, b in zip(best, best[1:]))
    text = figure.svg(documents)
    assert text.count("<circle") == len(found) and all(f">{p.name}</text>" in text for p in best)
    own = [d for d in documents if d["recipe"] == "tinted-sd_lcm"]
    (alone,) = figure.points(own)
    results = own[0]["results"]
    student, teacher = results["student"], results["teacher"]
    assert alone.ratio == pytest.approx(student["fd_mini"] / teacher["fd_mini"], rel=0.5)
    assert figure.svg([]) == ""
    quick = {**own[0], "results": {**results, "student": {**student, "seconds_per_sample": 1e-9}}}
    assert figure.points([quick])[0].faster > 1000 * alone.faster, "it is the student's time that counts"
