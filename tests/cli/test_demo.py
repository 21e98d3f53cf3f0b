"""fastgen demo: what a page draws, what it says to mistakes, and a click in a real browser."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgen.cli.demo import main
from fastgen.core.errors import UserError
from fastgen.export.load import load_export
from fastgen.training.exporting import export_run
from tests.cli.test_train import ROOT
from tests.export.test_plain_diffusers import make_run, ours
from tests.support.browser import CHROMIUM, WIDER, browser
from tests.support.ports import free_port
from tests.support.tiny import PROMPTS

WAIT = 120


@pytest.fixture(scope="module")
def exports(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    runs = {
        "sd": make_run(tiny("sd"), "lora", root / "sd", num_steps=2),
        "flow": make_run(tiny("flow"), "full", root / "flow"),
    }
    return {name: export_run(run, root / name / "export", {}) for name, run in runs.items()}


def model_of(path):
    from fastgen.cli.demo_model import DemoModel

    return DemoModel(str(path))


def ask(**given):
    from fastgen.cli.demo_model import Request

    return Request(**given)


def test_it_draws_what_sample_py_draws(exports):
    """Seeds 11 and 12 of one prompt, the teacher's beside them, and a LoRA at no weight is its teacher."""
    model = model_of(exports["sd"])
    drawn = model.draw(ask(prompt=PROMPTS[0], steps=2, seed=11, num_images=2, compare=True))
    loaded = load_export(exports["sd"])
    torch.testing.assert_close(drawn[0].images, ours(loaded, [PROMPTS[0]] * 2))
    assert drawn[0].nfe == 2 and drawn[1].nfe == 6 and min(one.seconds for one in drawn) > 0
    assert (drawn[1].images - drawn[0].images).abs().max() > 1e-2
    without = model.draw(ask(prompt=PROMPTS[0], steps=2, seed=11, num_images=2, weight=0.0))[0]
    base = load_export(exports["sd"])
    base.role = base.student.with_network(base.reference().role)
    torch.testing.assert_close(without.images, ours(base, [PROMPTS[0]] * 2), rtol=1e-3, atol=1e-4)
    again = model.draw(ask(prompt=PROMPTS[0], steps=2, seed=11, num_images=2))[0]
    torch.testing.assert_close(again.images, drawn[0].images)


def test_it_offers_what_the_model_takes(exports, tiny):
    sd, flow, teacher = (model_of(p) for p in (exports["sd"], exports["flow"], tiny("sd")))
    assert sd.takes_text and sd.is_lora and sd.has_teacher and sd.step_choices == [2] and not sd.labels
    assert sd.guidance_range is None, "guidance is baked in"
    assert flow.labels == [str(i) for i in range(10)] and not flow.takes_text and not flow.is_lora
    assert teacher.guidance_range and not teacher.has_teacher and 20 in teacher.step_choices
    a, b = (flow.draw(ask(label=label, steps=1))[0].images for label in "37")
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "said"),
    [({"prompt": "  "}, "prompt: it is empty"), ({"prompt": "x", "image": "no.png"}, "takes no image")],
)
def test_a_mistake_on_the_page_is_one_line(exports, given, said):
    with pytest.raises(UserError, match=said):
        model_of(exports["sd"]).draw(ask(**given))


def test_a_picture_that_cannot_be_read_is_one_line(tmp_path):
    from tests.families.world import World

    World("controlnet", tmp_path / "teacher")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    model = model_of(tmp_path / "teacher")
    with pytest.raises(UserError, match="image: none given"):
        model.draw(ask(prompt="x", steps=1))
    with pytest.raises(UserError, match="cannot be read"):
        model.draw(ask(prompt="x", steps=1, image=str(tmp_path / "broken.png")))


@pytest.mark.parametrize("kind", ["sd", "flow", "controlnet"])
def test_it_draws_once_before_the_first_click(kind, exports, tmp_path, monkeypatch):
    """At the model's own steps, with a picture where one is needed; one's own picture then gives another."""
    from PIL import Image

    from tests.families.world import World

    if kind == "controlnet":
        World(kind, tmp_path / "teacher")
    model = model_of(exports.get(kind, tmp_path / "teacher"))
    asked, draw = [], model.draw
    monkeypatch.setattr(model, "draw", lambda request: asked.append(request) or draw(request))
    model.warm_up(tmp_path)
    (request,) = asked
    assert request.steps == model.steps and bool(request.image) == model.takes_image == (kind == "controlnet")
    if model.takes_image:
        Image.new("RGB", (50, 70), "teal").save(tmp_path / "mine.png")
        given = {"prompt": "x", "steps": 2, "seed": 1}
        grey, own = (
            model.draw(ask(**given, image=str(tmp_path / name)))[0].images
            for name in ("grey.png", "mine.png")
        )
        assert own.shape == grey.shape and not torch.equal(own, grey)


# -- the command ---------------------------------------------------------------------------------------------
@pytest.fixture
def port():
    return free_port()


@pytest.mark.parametrize("argv", [("--model", "nowhere/at/all"), ("--model", "{tmp}"), ("--port", "70000")])
def test_without_a_model_or_a_port_it_is_one_line(argv, tmp_path, capsys, port):
    pytest.importorskip("gradio")
    words = [a.format(tmp=tmp_path) for a in argv]
    words += [] if "--model" in words else ["--model", "x"]
    words += [] if "--port" in words else ["--port", str(port)]
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(exports, capsys):
    pytest.importorskip("gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["--model", str(exports["sd"]), "--port", str(other.getsockname()[1])]) == 2
    err = capsys.readouterr().err
    assert "cannot be used" in err and len(err.splitlines()) == 1


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["--model", "x"]) == 2
    assert 'pip install "fastgen-distill[demo]"' in capsys.readouterr().err


# -- a browser -----------------------------------------------------------------------------------------------
class Served:
    """`fastgen demo` in a process of its own."""

    def __init__(self, export: Path, port: int, log: Path):
        self.address, self.log = f"http://127.0.0.1:{port}", log
        argv = [sys.executable, "-m", "fastgen", "demo", "--model", str(export), "--port", str(port)]
        with log.open("w") as file:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(argv, stdout=file, stderr=file, env=environment)
        self._wait(port)

    def _wait(self, port: int) -> None:
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(f"no page after {WAIT} s: {self.log.read_text()}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_a_prompt_typed_in_a_browser_becomes_a_picture(exports, port, tmp_path):
    pytest.importorskip("gradio")
    served = Served(exports["sd"], port, tmp_path / "log")
    try:
        with browser() as open_page:
            page, problems = open_page(served.address, 1300, 900)
            page.fill("#prompt textarea", PROMPTS[1])
            page.check("#compare input")
            page.click("#draw")
            for name in ("own", "teacher"):
                page.wait_for_selector(f"#{name} img", timeout=1000 * WAIT)
                assert page.eval_on_selector(f"#{name} img", "i => i.naturalWidth") > 0
            assert page.locator("#own .grid-wrap img, #own button img").count() >= 4
            assert "times as fast" in page.inner_text("#said")
            for width in (1300, 400):
                page.set_viewport_size({"width": width, "height": 900})
                page.wait_for_timeout(300)
                if folder := os.environ.get("FASTGEN_SCREENSHOTS"):
                    page.screenshot(path=Path(folder) / f"demo-{width}.png", full_page=True)
                assert page.evaluate(WIDER) == [], f"wider than the page of {width}"
            page.fill("#prompt textarea", "")
            page.click("#draw")
            page.wait_for_selector("text=prompt: it is empty", timeout=1000 * WAIT)
            assert page.locator("#own img").count(), "the pictures before stay"
            assert problems == []
    finally:
        served.close()
