"""What a run shows: its table, what it found, how far it is; on own data nothing of anybody else's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastgen.cli import overview
from fastgen.config.run import load, validate
from fastgen.training.assembly import FEW, make_evaluator, make_weightless_cast

ROOT = Path(__file__).resolve().parents[2]


# -- the table -----------------------------------------------------------------------------------------------
def test_rows_are_aligned_wrapped_and_not_repeated():
    text = overview.table([("stages", "one"), ("stages", "two"), ("data", "word " * 40)])
    lines = text.splitlines()
    assert lines[:2] == ["stages    one", "          two"] and lines[2].startswith("data      word")
    assert len(lines) == 5 and all(len(line) <= 96 for line in lines)
    assert all(line.startswith(" " * 10) for line in lines[3:])


def test_the_table_of_a_staged_run():
    cfg = load(["configs:recipes/quickstart.yaml"], [])
    rows = overview.settings_rows(cfg)
    assert [label for label, _ in rows] == ["run", "stages", "stages", "data", "device", "measures"]
    said = dict(rows)
    assert rows[1][1] == "1/2 warm (ode_pairs): 300 steps, batch 32"
    assert said["run"] == "runs/quickstart" and said["data"] == "fashion (bundled), the first 5,120"
    assert "float32" in said["device"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_networks_are_counted_with_their_trained_share(kind):
    argv = ["--student.kind", kind, "--student.lora.rank", "2"]
    cfg = load(["configs:recipes/digits_dmd2.yaml"], argv)
    cast = make_weightless_cast(cfg)
    rows = dict(overview.network_rows(cast, cfg.train))
    frozen = sum(p.numel() for n, p in cast.teacher.backbone.named_parameters() if "lora_" not in n)
    trained = sum(p.numel() for p in cast.student.trainable().values())
    assert rows["teacher"].split()[:2] == [f"{frozen:,}", "frozen"]
    assert rows["student"].split()[:2] == [f"{trained:,}", "trained"]
    share = f"{trained / (trained + frozen):.1%}"
    assert (f"adapter on the teacher, {share} of it" if kind == "lora" else "of its own") in rows["student"]
    assert "critic" in rows and re.match(r"\d+\.\d [MG]B estimated", rows["memory"])


def test_a_denoiser_that_is_trained_itself_stands_beside_no_teacher():
    cfg = load(["configs:teachers/digits.yaml"], [])
    rows = dict(overview.network_rows(make_weightless_cast(cfg), cfg.train))
    assert "teacher" not in rows and "of its own" in rows["student"]


def test_linear_attention_is_counted_under_gradient_checkpointing(tiny):
    """On the meta device, of which autocast knows nothing."""
    argv = ["--teacher.path", str(tiny("sana")), "--train.gradient_checkpointing", "true"]
    cfg = load(["configs:recipes/tinted-sana_tdm.yaml"], argv)
    assert "estimated" in dict(overview.network_rows(make_weightless_cast(cfg), cfg.train))["memory"]


def test_the_first_rows_need_nothing_heavy():
    """They are printed before diffusers and transformers, which take most of the seconds of a start."""
    code = (
        "import sys\nfrom fastgen.cli import overview\nfrom fastgen.config.run import load\n"
        "print(overview.table(overview.settings_rows(load(['configs:recipes/digits_dmd2.yaml'], []))))\n"
        "print([m for m in ('diffusers', 'transformers', 'peft', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("run       runs/digits_dmd2\nstages    dmd2: 1,800 steps")
    assert done.stdout.splitlines()[-1] == "[]"


# -- a run on own pictures, as a log file sees it ------------------------------------------------------------
CAPTIONS = [f"a toy number {i}" for i in range(6)]
OURS = (
    r"--max_steps 3: steps lcm 3; \d+ samples are measured",
    r"--method lcm: (settings of sd15|float32).*",
    r"(run|stages|data|device|measures|teacher|student|memory) +\S.*",
    r"loading .* \.\.\.",
    r"loading .*: \d+ s",
    r"data: 6 images, 6 captions; 2 skipped: 6\.png \(no caption\), 2b\.png \(.*\)",
    r"warning: data\.images: skipped 1 unreadable: 2b\.png .*",
    r"every prompt is encoded: text encoders freed, .*",
    r"lcm: \d/3 \(\d+%\), .*",
    r"drawing \d+ samples of the .*: \d+/\d+ .*",
    r"warning: the CPU is shared.*",
    r" +teacher  untrained student +student",
    r"\w[\w/]+( +[-\d.e+]+)+",
    r"warning: .*; try .*",
    r"(report|export|sample)  \S.*",
)


@pytest.fixture(scope="module")
def own_run(tiny, tmp_path_factory):
    """A short LoRA run of a tiny Stable Diffusion on eight files of a user, in a process of its own."""
    work = tmp_path_factory.mktemp("own")
    (work / "my").mkdir()
    for i in range(7):
        Image.new("RGB", (40, 40), (20 * i, 90, 200)).save(work / f"my/{i}.png")
    for i, text in enumerate(CAPTIONS):
        (work / f"my/{i}.txt").write_text(text)
    (work / "my/2b.png").write_bytes(b"no picture")
    (work / "my/2b.txt").write_text("a toy that is damaged")
    argv = ["--method", "lcm", "--teacher", str(tiny("sd")), "--data.images", "my", "--max_steps", "3"]
    quick = {"student.kind": "lora", "train.train_batch_size": 2, "teacher.num_steps": 2}
    quick |= {"eval.num_samples": 6, "eval.batch_size": 6, "eval.grid": 4, "train.validation_steps": 0}
    argv += [word for key, value in quick.items() for word in (f"--{key}", str(value))]
    names = ("TQDM_DISABLE", "PYTHONWARNINGS", "RANK", "SLURM_JOB_ID")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    command = [sys.executable, str(ROOT / "train.py"), *argv, "--output_dir", "run"]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return SimpleNamespace(out=done.stdout, err=done.stderr, folder=work / "run")


def test_no_library_speaks_in_a_run(own_run):
    lines = [line for line in (own_run.out + own_run.err).splitlines() if line.strip()]
    assert [line for line in lines if not any(re.fullmatch(ours, line) for ours in OURS)] == []
    assert all(
        len(line) <= 110 for line in own_run.out.splitlines() if not line.startswith(("re", "ex", "sa"))
    )


def test_a_log_has_the_table_the_counts_and_the_stage_with_its_loss(own_run):
    assert own_run.out.index("run       run") < own_run.out.index("teacher ") < own_run.out.index("data: 6 ")
    assert re.search(r"^lcm: 1/3 \(33%\), student [\d.e-]+", own_run.err, re.M)
    assert re.search(r"^lcm: 3/3 \(100%\), in \d+ s$", own_run.err, re.M)
    assert "\r" not in own_run.err + own_run.out


def test_a_run_on_own_pictures_is_measured_against_them(own_run):
    results = json.loads((own_run.folder / "results.json").read_text())
    for who in ("teacher", "student"):
        assert results[who]["fd_own_images"] > 0 and "fd_mini" not in results[who]
    assert results["student"]["fd_teacher_features"] >= 0


def test_what_a_run_suggests_is_a_prompt_of_the_user(own_run):
    suggested = next(line for line in own_run.out.splitlines() if line.startswith("sample"))
    assert "--prompt 'a toy number 0'" in suggested
    assert 'prompt="a toy number 0"' in (own_run.folder / "export/README.md").read_text()


# -- what is measured against what ---------------------------------------------------------------------------
DATA = SimpleNamespace(
    degradation=None,
    originals=None,
    cond_table={"x": torch.zeros(2, 1)},
    rows=torch.tensor([0, 1]),
    uncond={"x": torch.zeros(1, 1)},
    texts=["a cat", "a dog"],
    own={},
    x0=None,
)


def evaluator(section, *argv, teacher="assets:teachers/tinted-sd"):
    values = {"objective": {"name": "swiftbrush"}, "teacher": {"path": teacher}, "data": section}
    cfg = validate(values | {"eval": dict(zip(argv[::2], map(int, argv[1::2])))})
    return make_evaluator(cfg, make_weightless_cast(cfg), DATA)


def test_prompts_of_the_user_are_what_is_asked_for(capsys):
    own = evaluator({"prompts": "mine.txt"})
    assert own.requests.texts(3) == ["a cat", "a dog", "a cat"]
    assert own.measurer is None and own.label_free
    digits = "assets:teachers/digits"
    assert evaluator({"images": "mine"}, teacher=digits).measurer is None
    assert evaluator({"name": "digits"}, teacher=digits).measurer is not None


def test_as_many_samples_as_there_is_to_measure(capsys):
    assert evaluator({"prompts": "mine.txt"}).protocol.num_samples == FEW == 100
    assert "measuring 100 samples of each: eval.metrics is empty" in capsys.readouterr().out
    assert evaluator({"prompts": "mine.txt"}, "num_samples", "400").protocol.num_samples == 400
    assert evaluator({"prompts": "mine.txt"}, "num_samples", "0").protocol.num_samples == 0
    bundled = evaluator({"name": "digits"}, teacher="assets:teachers/digits")
    assert bundled.protocol.num_samples == 1000
    assert capsys.readouterr().out == ""
