"""fastgen report: written, served and compared; looked at in a browser at two widths, light and dark."""

import contextlib
import http.client
import json
import os
import socket
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from fastgen.cli import report
from fastgen.cli.report import main
from fastgen.evaluation.sample_grids import save_grid, save_requests
from fastgen.training import run_folder
from tests.support.browser import CHROMIUM, WIDER, browser

CONFIG = """
teacher: {path: "assets:teachers/tinted-sd", num_steps: 20, guidance: 2.0}
student: {kind: full, num_steps: 1}
stages:
- {name: warm, objective: {name: ode_pairs}, max_train_steps: 300}
- {name: match, objective: {name: dmd2, time: {low: 0.1}}, max_train_steps: 200}
"""
ROW = {
    "nfe": 1,
    "seconds_per_sample": 0.005,
    "fd_mini": 5.1,
    "mmd": 158.7,
    "precision": 0.98,
    "recall": 0.896,
}
RESULTS = {
    "teacher": {**ROW, "nfe": 40, "seconds_per_sample": 0.11, "fd_mini": 4.2},
    "student": {**ROW, "agreement": 0.93, "agreement_garment": 0.93, "agreement_background": 1.0},
    "protocol": {"num_samples": 500, "seed": 7, "guidance": 2.0, "extractor": "assets:measure/" + "x" * 70},
}


def make_run(folder, finished=True, texts=("a red dress on a grey background", "bag")):
    """A run folder of two stages, with six validations; not finished, it stands at step 400."""
    last = 500 if finished else 400
    random = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 32, 32, generator=random)
    steps = range(0, last + 1, 100)
    for name in ("teacher", *(f"step_{k:06d}" for k in steps), *(["student", "untrained"] * finished)):
        save_grid(images, folder / "samples" / f"{name}.png")
        images = (images + 0.2 * torch.rand(images.shape, generator=random)).clamp(0, 1)
    save_requests(images, [texts[i % 2] for i in range(12)], folder / "samples" / "requests.json")
    (folder / "config.yaml").write_text(CONFIG)
    lines = [
        {"step": k, "student/loss": 1 / k, "critic/loss": 2.0 + k % 7, "seconds": k} for k in range(1, last)
    ]
    lines += [{"step": k, "validation/fd_mini": 60.0 / (k + 10), "validation/recall": 0.5} for k in steps]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if finished:
        (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


@contextlib.contextmanager
def served(folders):
    """The address of the page of run folders, served by a thread."""
    server = ThreadingHTTPServer((report.HOST, 0), report._handler(folders, 0))
    port = server.server_address[1]
    server.RequestHandlerClass = report._handler(folders, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield port
    server.shutdown()
    server.server_close()


def ask(port, path="/", host=""):
    link = http.client.HTTPConnection(report.HOST, port)
    link.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = link.getresponse()
    return answer.status, answer.read().decode()


def test_one_run_is_written_and_several_are_compared(tmp_path, monkeypatch, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert main([str(a)]) == 0
    assert ">finished<" in (a / "report" / "index.html").read_text()
    assert main([str(a), str(b)]) == 0 and "a and b" in (tmp_path / "runs.html").read_text()
    assert main([str(a), str(b), "--out", "page.html"]) == 0 and (tmp_path / "page.html").is_file()
    assert capsys.readouterr().out.count("report  ") == 3


def test_a_run_still_being_written_is_shown_as_it_is(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    with run_folder.opened(folder, True, False), served([folder]) as port:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('\n{"step": 499, "stud')
        status, page = ask(port)
        assert status == 200 and "data-live" in page and ">training<" in page
        (folder / "results.json").write_text("[]")
        status, page = ask(port)
        assert status == 500 and "results.json" in page and len(page.splitlines()) == 1
        (folder / "results.json").unlink()
    with served([folder]) as port:
        assert "data-live" not in ask(port)[1] and "stopped at step 400" in ask(port)[1]


def test_only_the_page_is_served_and_only_to_this_machine(tmp_path):
    folder = make_run(tmp_path / "run")
    with served([folder]) as port:
        assert ask(port, "/?again")[0] == 200 and ask(port, "/config.yaml")[0] == 404
        assert ask(port, "/../config.yaml")[0] == 404
        assert ask(port, host="elsewhere.example")[0] == 404, "a name that was bound to this machine"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["nowhere"], "not a run folder"),
        (["run", "run"], "the same run twice"),
        (["run", "--serve", "--port", "0"], "give 1 to 65535"),
        (["run", "--serve", "--port", "PORT"], "cannot be used"),
        (["run", "other", "--out", "page.txt"], "give a .html file"),
        (["run", "--out", "page.html"], "leave it out"),
    ],
)
def test_mistakes_are_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run"), make_run(tmp_path / "other")
    with socket.socket() as taken:
        taken.bind((report.HOST, 0))
        taken.listen()
        argv = [str(taken.getsockname()[1]) if word == "PORT" else word for word in argv]
        assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "run"]
    assert not (tmp_path / "run" / "report").exists()


def look(page, name):
    """Keep a screenshot where they are wanted."""
    if folder := os.environ.get("FASTGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def brightness(colour):
    """Of rgb(r, g, b), as a sum."""
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
@pytest.mark.parametrize("kind", ["finished", "running", "compared"])
def test_pages_fit_and_complain_of_nothing(kind, tmp_path):
    runs = [make_run(tmp_path / name, kind != "running") for name in ("first", "second")]
    runs = runs if kind == "compared" else runs[:1]
    with served(runs) as port, browser() as open_page:
        page, problems = open_page(f"http://127.0.0.1:{port}", 1300, 900)
        page.locator("summary").evaluate_all("all => all.forEach(s => s.parentElement.open = true)")
        for width, scheme in ((1300, "light"), (1300, "dark"), (400, "dark"), (400, "light")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(WIDER) == [], (width, scheme)
            look(page, f"report-{kind}-{width}-{scheme}")
            ink, back = page.evaluate(
                "() => ['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k])"
            )
            assert (brightness(ink) < brightness(back)) == (scheme == "light")
            sizes = page.locator(".card img:visible").evaluate_all(
                "all => all.map(i => Math.round(i.getBoundingClientRect().width))"
            )
            assert len(sizes) == 24 and max(sizes) - min(sizes) <= 1 and min(sizes) > 70
        assert problems == []


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_pictures_are_enlarged_and_compared(tmp_path):
    folder = make_run(tmp_path / "run")
    main([str(folder)])
    with browser() as open_page:
        page, problems = open_page((folder / "report" / "index.html").as_uri(), 1300, 900)
        card = page.locator(".card").nth(1)
        assert card.inner_text().strip() == "bag"
        page.get_by_text("slider", exact=True).click()
        page.locator(".cut input").fill("25")
        right = card.locator("img.right")
        assert "25%" in right.evaluate("i => getComputedStyle(i).clipPath")
        page.select_option("#right", "untrained student")
        assert card.locator("img:visible").count() == 2
        page.select_option("#left", "untrained student")
        assert page.locator("#right").input_value() == "0", "the two change places"
        card.locator("button").click()
        assert page.locator("dialog").is_visible() and page.locator("dialog img").count() == 2
        wide = page.locator("dialog img").first.bounding_box()["width"]
        assert wide > 2 * card.locator("img").first.bounding_box()["width"]
        look(page, "report-enlarged")
        page.locator("dialog input").fill("80")
        assert "80%" in page.locator("dialog img.right").evaluate("i => getComputedStyle(i).clipPath")
        page.get_by_text("next", exact=True).click()
        assert (
            "3 of 12" in page.locator("dialog").inner_text() and "dress" in page.locator(".text").inner_text()
        )
        page.get_by_text("close", exact=True).click()
        assert not page.locator("dialog").is_visible()
        page.locator(".term").first.hover()
        assert "Frechet" in page.locator("#tip").inner_text()
        plot = page.locator("svg.plot").first
        plot.hover()
        assert " at " in plot.locator(".read").first.text_content()
        assert problems == []


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_page_left_open_follows_the_run(tmp_path, monkeypatch):
    """New numbers come by themselves, the reader's choices stay, and at the run's end the page rests."""
    folder = make_run(tmp_path / "run", finished=False)
    monkeypatch.setattr("fastgen.evaluation.pages.LIVE_SECONDS", 0.5)
    with browser() as open_page, served([folder]) as port:
        with run_folder.opened(folder, True, False):
            page, problems = open_page(f"http://127.0.0.1:{port}", 1300, 900)
            page.get_by_text("slider", exact=True).click()
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('\n{"step": 500, "validation/fd_mini": 0.0123, "student/loss": 1}')
            page.get_by_text("0.0123").first.wait_for(timeout=10_000)
            assert page.locator("#pictures.overlay").count() == 1
        (folder / "results.json").write_text(json.dumps(RESULTS))
        page.get_by_text("finished", exact=True).wait_for(timeout=10_000)
        page.evaluate("window.same = true")
        page.wait_for_timeout(1500)
        assert page.evaluate("window.same") and problems == []
