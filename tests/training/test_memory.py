"""Released models from their published configs: --dry_run at full size, the page of memory needs."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastgen.cli.train import main
from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.training import memory
from fastgen.training.memory import models, row

PROMPTS = Path(__file__)  # a text file: one prompt a line
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/memory.md").read_text()
QUICK = ("sd15", "ltx")  # the whole page is computed by `pytest -m slow`


def test_the_page_has_every_model_once():
    lines = [line for line in PAGE.splitlines() if line.startswith("| [")]
    assert [line.partition("]")[0].removeprefix("| [") for line in lines] == models()
    assert PAGE.startswith(memory.HEAD.format(usable=memory.USABLE, num=4).split("|")[0])


@pytest.mark.parametrize("name", QUICK)
def test_the_page_is_current(name):
    assert row(name) in PAGE.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [n for n in models() if n not in QUICK])
def test_the_whole_page_is_current(name):
    assert row(name) in PAGE.splitlines()


@pytest.mark.parametrize("name", models())
def test_a_released_model_s_config_is_whole(name):
    """It validates with an objective, names a hub id, a size and the class of every part."""
    values = read_files([str(ROOT / f"configs/teachers/{name}.yaml")])
    cfg = validate({**values, "objective": {"name": "sft"}, "data": {"name": "tinted"}})
    layout = cfg.teacher.layout
    assert cfg.teacher.path.count("/") == 1 and cfg.teacher.height and cfg.teacher.width and cfg.teacher.dtype
    parts = [layout["net"], layout["scheduler"], layout["index"], *layout["codec"].values()]
    assert all(part["_class_name"] for part in parts) and "vae" in layout["codec"]


def ask(name, *more):
    """A dry run over the released model with a critic, as a user would ask for it."""
    files = [str(ROOT / f"configs/teachers/{name}.yaml"), str(ROOT / "configs/objectives/dmd2.yaml")]
    given = ["--objective.gan_weight", "0", "--data.prompts", str(PROMPTS), "--dry_run"]
    return main(["--config", *files, *given, *more])


def test_dry_run_at_full_size(capsys):
    """Everything up to loading, without weights: a video model with its encoders."""
    assert ask("wan2.1-1.3b") == 0
    printed = capsys.readouterr().out
    assert "1,418,996,800" in printed and "adapter on the teacher" in printed
    assert "student times: 1, 0.9, 0.75, 0.5" in printed and "text and image encoders" in printed


@pytest.mark.parametrize(
    "flag,value,allowed",
    [
        ("--teacher.num_frames", "80", "1 plus a multiple of 4"),
        ("--teacher.height", "488", "a multiple of 16"),
    ],
)
def test_sizes_that_do_not_fit(capsys, flag, value, allowed):
    code = ask("wan2.1-1.3b", flag, value)
    printed = capsys.readouterr().err
    assert code == 2 and printed.count("\n") == 1 and allowed in printed and value in printed


def test_frames_of_an_image_model(capsys):
    assert ask("sd15", "--teacher.num_frames", "9") == 2
    assert "teacher.num_frames" in capsys.readouterr().err


def test_without_weights_only_a_dry_run_works(capsys, tmp_path):
    files = [str(ROOT / "configs/teachers/sd15.yaml"), str(ROOT / "configs/objectives/dmd2.yaml")]
    (tmp_path / "p.txt").write_text("a red dress\n")
    given = ["--objective.gan_weight", "0", "--data.prompts", str(tmp_path / "p.txt")]
    given += ["--train.mixed_precision", "no"]  # accelerate keeps the first precision of a process
    assert main(["--config", *files, *given, "--output_dir", str(tmp_path / "run")]) == 2
    assert "local hub cache" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_attention_is_counted_as_fused_kernels_keep_it():
    """Inputs and output, not the matrix of weights that PyTorch's meta device would keep."""
    q = torch.randn(1, 2, 64, 8, device="meta", requires_grad=True)
    sizes = []
    for mode in (memory._FusedAttention(), nullcontext()):
        kept = memory._Kept(set())
        with mode, torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
            F.scaled_dot_product_attention(q, 1 * q, 2 * q)
        sizes.append(kept.size)
    assert sizes[0] == 4 * (2 * 64 * 8 * 4) and sizes[1] > 2 * 64 * 64 * 4


def test_checkpointing_keeps_less():
    values = read_files([str(ROOT / "configs/teachers/sd15.yaml")])
    values |= {"objective": {"name": "dmd2", "gan_weight": 0.0}, "data": {"prompts": "any"}}
    sizes = []
    for on in (True, "selective", False):
        cfg = validate({**values, "train": {**values["train"], "gradient_checkpointing": on}})
        sizes.append(list(memory.estimate(memory.make_cast(cfg, "meta"), cfg.train).rows.values())[-1])
    assert 0 < 2 * sizes[0] < sizes[1] < 0.6 * sizes[2]
