"""Protocols by name: whole files, numbers that say where they depart, layouts of other tools and back."""

import json

import numpy as np
import pytest
from PIL import Image

from fastgen.cli.evaluate import main
from fastgen.evaluation import layouts, protocols
from fastgen.evaluation.inputs import open_source
from fastgen.evaluation.registry import wanted
from fastgen.evaluation.sources import Squared
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A one-step Stable Diffusion LoRA."""
    root = tmp_path_factory.mktemp("exports")
    return export_run(make_run(tiny("sd"), "lora", out=root / "sd"), root / "sd" / "export", {})


def call(capsys, *argv):
    """(exit code, stdout, last line of stderr)."""
    code = main(["protocol", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, (said.err.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("name", protocols.names())
def test_a_protocol_says_what_it_needs(name):
    one = protocols.read(name)
    assert one.name == name and one.sha256 and one.guidance and one.prompts
    assert bool(one.layout) != bool(one.metrics), "measured here or by its own tool"
    if not name.startswith("mini"):
        assert one.used_by, "which papers"
    if any("reference" in wanted(m).metric.needs for m in one.metrics):
        assert one.reference


def test_the_published_ones_are_there(capsys):
    names = {"coco2014-30k", "coco2017-5k", "mjhq-30k", "geneval", "dpg", "vbench"}
    names |= {f"imagenet-{size}" for size in (64, 256, 512)} | {
        f"mini-{s}" for s in ("digits", "fashion", "tinted")
    }
    assert names == set(protocols.names())
    code, out, _ = call(capsys)
    assert code == 0 and all(f"`{n}`" in out for n in names)
    assert protocols.read("coco2014-30k").num_samples == 30_000 and protocols.read("geneval").group_size == 4


def test_a_mini_is_measured_by_name(tmp_path, capsys):
    argv = ["mini-digits", "--model", "assets:teachers/digits", "--steps", 1]
    argv += ["--num_samples", 30, "--out", tmp_path / "o"]
    assert main(["protocol", *map(str, argv)]) == 0
    out, said = capsys.readouterr()
    assert "30 images in place of 5,000; not comparable with published numbers" in said
    found = json.loads(out)
    assert found["protocol"]["departures"] == ["30 images in place of 5,000"] and found["fd_mini"] > 0
    assert found == json.loads((tmp_path / "o/results.json").read_text())
    assert found["intervals"].keys() == {
        "fd_mini",
        "kid_mini",
        "precision_mini",
        "recall_mini",
        "agreement_mini",
    }
    again = main(["--protocol", *map(str, argv)])
    assert again == 0 and json.loads(capsys.readouterr().out)["fd_mini"] == found["fd_mini"]


def test_what_a_protocol_refuses(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("title: x\nnum_samples: 1\nprompts: none\nguidance: none\n")
    base = ("--model", "assets:teachers/digits", "--out", tmp_path / "o")
    for argv, said in (
        (("coco2014-30", *base), "did you mean 'coco2014-30k'"),
        (("coco2014-30k", *base), "--against: none given; give the images of val2014"),
        (("imagenet-64", *base), "give EDM's statistics"),
        ((tmp_path / "bad.yaml", *base), "bad.yaml: num_samples"),
        (("mini-digits",), "give either --model or --images"),
        (("mini-digits", "--model", "x"), "--out: none given"),
        (("geneval", *base), "--prompts: none given; give evaluation_metadata.jsonl"),
        (("mini-digits", "--results", "x"), "mini-digits is measured here"),
    ):
        code, _, error = call(capsys, *argv)
        assert code == 2 and said in error, error


def test_both_sets_are_squared_alike(tmp_path):
    for i, (width, height) in enumerate(((20, 10), (8, 16))):
        pixels = np.zeros((height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    source = Squared(open_source(str(tmp_path)), 4)
    assert source.all().shape == (2, 3, 4, 4) and source.digest() != Squared(source.source, 5).digest()


# -- layouts
METADATA = [
    {"tag": "single_object", "prompt": "a photo of a bench"},
    {"tag": "counting", "prompt": "a photo of two clocks"},
]


def test_geneval_goes_out_and_comes_back(model, tmp_path, capsys):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, METADATA)))
    code, out, _ = call(capsys, "geneval", "--model", model, "--prompts", file, "--out", tmp_path / "o")
    assert code == 0 and "wrote 8 samples of 2 prompts" in out
    for i, item in enumerate(METADATA):
        folder = tmp_path / "o/geneval" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == item
        assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"{k:04d}.png" for k in range(4)]
    results = tmp_path / "results.jsonl"
    right = {"single_object": [True, True, True, False], "counting": [True, False]}
    lines = [json.dumps({"tag": t, "correct": c}) for t, found in right.items() for c in found]
    results.write_text("\n".join(lines))
    code, out, _ = call(capsys, "geneval", "--results", results)
    assert code == 0 and json.loads(out)["overall"] == pytest.approx((0.75 + 0.5) / 2)
    results.write_text("nothing")
    assert "holds no results of geneval" in call(capsys, "geneval", "--results", results)[2]


def test_dpg_goes_out_and_comes_back(model, tmp_path, capsys):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in ("1", "partiprompts7"):
        (prompts / f"{name}.txt").write_text(f"a long prompt {name}\n")
    assert call(capsys, "dpg", "--model", model, "--prompts", prompts, "--out", tmp_path / "o")[0] == 0
    sheets = sorted((tmp_path / "o/dpg").iterdir())
    single = Image.open(tmp_path / "o/images/000000.png")
    assert [p.stem for p in sheets] == ["1", "partiprompts7"]
    sheet = Image.open(sheets[0])
    assert sheet.size == (2 * single.width, 2 * single.height)
    assert np.array_equal(np.array(sheet)[: single.height, : single.width], np.array(single))
    summary = "Model: x\nL1 category scores:\n\tentity: 81.5\n\tglobal: 70\nDPG-Bench score: 76.25\n"
    (tmp_path / "r.txt").write_text("images/1.png, 1.0, 0.5\n" + summary)
    found = layouts.read_results("dpg", tmp_path / "r.txt")
    assert found == {"entity": 81.5, "global": 70, "overall": 76.25}


def test_vbench_goes_out_and_comes_back(tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    entries = []
    for i in range(4):
        Image.new("L", (8, 8)).save(folder / f"{i}.gif")
        entries.append({"file": f"{i}.gif", "condition": ("a cat", "a dog/wolf")[i % 2]})
    (folder / "samples.json").write_text(json.dumps({"images": entries}))
    info = tmp_path / "info.json"
    info.write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["scene"]}, {"prompt_en": "a dog/wolf"}]))
    assert call(capsys, "vbench", "--images", folder, "--prompts", info, "--out", tmp_path / "o")[0] == 0
    names = sorted(p.name for p in (tmp_path / "o/vbench").iterdir())
    assert names == ["a cat-0.gif", "a cat-1.gif", "a dog wolf-0.gif", "a dog wolf-1.gif"]
    best = {k.replace(" ", "_"): [high, []] for k, (_, high) in layouts.BOUNDS.items()}
    (tmp_path / "r.json").write_text(json.dumps(best | {"dynamic_degree": [0.0, []]}))
    found = layouts.read_results("vbench", tmp_path / "r.json")
    assert found["semantic"] == pytest.approx(1) and found["quality"] == pytest.approx(6 / 6.5)
    assert found["overall"] == pytest.approx((4 * 6 / 6.5 + 1) / 5)
    (tmp_path / "part.json").write_text(json.dumps({"scene": [0.3, []]}))
    assert layouts.read_results("vbench", tmp_path / "part.json") == {"scene": 0.3}
