"""sample.py --base_steps, --visualize_dt and --lora: what they draw, and what they say to a wrong request."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli.sample import main
from fastgen.core.errors import UserError
from fastgen.export import lora
from fastgen.export.adapters import add_to, merge
from fastgen.export.load import load_export
from fastgen.networks.load import load_teacher
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run


@pytest.fixture(scope="module")
def exports(tiny, tmp_path_factory):
    """A full student of two steps of a class teacher, and a LoRA of two steps of Stable Diffusion."""
    root = tmp_path_factory.mktemp("exports")
    flow = make_run(tiny("flow"), out=root / "flow", num_steps=2)
    sd = make_run(tiny("sd"), "lora", out=root / "sd", num_steps=2)
    return {n: export_run(r, root / n / "export", {}) for n, r in {"flow": flow, "sd": sd}.items()}


ASK = {"flow": ("--labels", "1,2"), "sd": ("--prompt", "a red dress", "--prompt", "a bag")}


def call(capsys, out, *argv):
    """(pictures [2, ...] or None, stdout, stderr)."""
    code = main([*map(str, argv), "--out", str(out)])
    said = capsys.readouterr()
    if code:
        assert code == 2 and len(said.err.strip().splitlines()) == 1, said.err
        return None, said.out, said.err
    files = sorted(out.glob("0*.png"))
    return np.stack([np.array(Image.open(f)).astype(int) for f in files]), said.out, said.err


@pytest.mark.parametrize("name", ["flow", "sd"])
def test_hybrid_is_neither_student_nor_teacher(name, exports, tmp_path, capsys):
    ask = ("--model", exports[name], *ASK[name])
    alone, _, _ = call(capsys, tmp_path / "a", *ask)
    mixed, said, _ = call(capsys, tmp_path / "b", *ask, "--base_steps", 4, "--guidance", 2)
    assert "hybrid, 2 base and 1 student steps" in said and "5 network calls each" in said
    plain, said, _ = call(
        capsys, tmp_path / "c", *ask, "--base_steps", 4, "--guidance", 1, "--compare_teacher"
    )
    assert "3 network calls each" in said and "teacher, 6 steps" in said
    for a, b in ((alone, mixed), (alone, plain), (mixed, plain)):
        assert np.abs(a - b).max() > 2  # equal pictures may differ by 1 from rounding


def test_the_picture_of_the_steps_ends_with_the_samples(exports, tmp_path, capsys):
    """dt.png: two samples in rows, the two estimates of the student in columns, then those of the teacher."""
    ask = ("--model", exports["flow"], *ASK["flow"], "--visualize_dt", "--compare_teacher")
    images, _, _ = call(capsys, tmp_path / "o", *ask)
    record = json.loads((tmp_path / "o/samples.json").read_text())
    assert record["visualize_dt"] == "dt.png"
    sheet = np.array(Image.open(tmp_path / "o/dt.png").convert("L")).astype(int)
    scale = 64 // images.shape[1]
    side = images.shape[1] * scale
    assert sheet.shape == (2 * (34 + 2 * (side + 2)), 6 * max(side + 2, 88))
    wide = max(side + 2, 88)
    for row in range(2):
        top = 34 + row * (side + 2)
        first, last = (sheet[top : top + side : scale, c * wide : c * wide + side : scale] for c in (0, 1))
        assert np.abs(last - images[row]).max() <= 1 and np.abs(first - images[row]).max() > 5


def test_a_lora_is_added_to_base_and_student(exports, tiny, tmp_path, capsys):
    """To its own base it gives the merged model; at scale 0 nothing; a student of the base takes it too."""
    file = next(exports["sd"].glob("*-lora.safetensors"))
    ask = (*ASK["sd"], "--steps", 3)
    base, _, _ = call(capsys, tmp_path / "base", "--model", tiny("sd"), *ask)
    none, _, _ = call(
        capsys, tmp_path / "none", "--model", tiny("sd"), *ask, "--lora", file, "--lora_scale", 0
    )
    full, _, _ = call(capsys, tmp_path / "full", "--model", tiny("sd"), *ask, "--lora", file)
    assert np.array_equal(base, none) and np.abs(base - full).max() > 10
    student, _, _ = call(capsys, tmp_path / "s", "--model", exports["sd"], *ASK["sd"])
    twice, _, _ = call(capsys, tmp_path / "t", "--model", exports["sd"], *ASK["sd"], "--lora", file)
    both = ("--lora", file) * 2 + ("--lora_scale", 1, "--lora_scale", -1)
    back, _, _ = call(capsys, tmp_path / "u", "--model", exports["sd"], *ASK["sd"], *both)
    assert np.abs(student - twice).max() > 10 and np.abs(student - back).max() <= 1


def test_the_update_is_scale_times_b_a(exports, tiny):
    """On the base, and beneath an adapter; the merged folder of `fastgen adapters` is the same at scale 1."""
    file = next(exports["sd"].glob("*-lora.safetensors"))
    layers = lora.read_lora(file)[0]
    teacher = load_teacher(str(tiny("sd")))
    before = {k: v.clone() for k, v in teacher.network.net.state_dict().items()}
    add_to(teacher.network, teacher, file, -1.5)
    after = teacher.network.net.state_dict()
    for name, (a, b) in layers.items():
        torch.testing.assert_close(
            after[f"{name}.weight"] - before[f"{name}.weight"], -1.5 * lora.delta(a, b)
        )
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"{name}.weight" for name in layers}
    loaded = load_export(exports["sd"])
    inner = dict(loaded.role.backbone.net.named_modules())[next(iter(layers))].base_layer.weight
    kept = inner.clone()
    add_to(loaded.role.backbone, loaded.teacher, file, 0.5)
    torch.testing.assert_close(inner - kept, 0.5 * lora.delta(*next(iter(layers.values()))))


def test_merged_and_added_are_the_same(exports, tiny, tmp_path):
    file = next(exports["sd"].glob("*-lora.safetensors"))
    teacher, merged = load_teacher(str(tiny("sd"))), merge(file, str(tiny("sd")), tmp_path / "merged")
    add_to(teacher.network, teacher, file)
    theirs = load_teacher(str(merged)).network.net.state_dict()
    for name, value in teacher.network.net.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def other_layer(file, out):
    """The same file with one layer under a name that no network has."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    first = next(k for k in tensors if ".lora_A" in k)
    stem = first.split(".lora_A")[0]
    renamed = {
        k.replace(stem, f"{stem}_gone") if k.startswith(f"{stem}.") else k: v for k, v in tensors.items()
    }
    save_file(renamed, out)
    return out


def test_mistakes_are_one_line(exports, tiny, tmp_path, capsys):
    sd, flow, ask = exports["sd"], exports["flow"], ASK["sd"]
    file = next(sd.glob("*-lora.safetensors"))
    gone = other_layer(file, tmp_path / "gone-lora.safetensors")
    shutil.copy(file, tmp_path / "x.txt")
    wrong = (
        (tiny("sd"), (*ask, "--base_steps", 4), ("--base_steps", "no few-step student")),
        (sd, (*ask, "--base_steps", 4, "--handover", 2), ("--handover", "none of the student's 2 steps")),
        (sd, (*ask, "--base_steps", -1), ("--base_steps", "-1")),
        (sd, (*ask, "--handover", 0, "--base_steps", 2), ("--handover", "found 0")),
        (sd, (*ask, "--handover", 1), ("--handover", "found 1 alone")),
        (sd, (*ask, "--teacher_steps", 3), ("--teacher_steps", "found 3 alone")),
        (sd, (*ask, "--scale", 2), ("--scale", "takes no image")),
        (sd, (*ask, "--lora", gone), ("--lora", "has no layer", "another base")),
        (flow, (*ASK["flow"], "--lora", file), ("--lora", "has no layer")),
        (sd, (*ask, "--lora", tmp_path / "none.safetensors"), ("--lora", "does not exist")),
        (sd, (*ask, "--lora", tmp_path), ("--lora", "is a folder")),
        (sd, (*ask, "--lora", file, *("--lora_scale", 1) * 3), ("--lora_scale", "found 3 for 1")),
        (sd, (*ask, "--lora_scale", 1), ("--lora_scale", "without --lora")),
        (sd, (*ask, "--lora", file, "--lora_scale", "nan"), ("--lora_scale", "nan")),
    )
    for model, argv, pieces in wrong:
        _, _, said = call(capsys, tmp_path / "o", "--model", model, *argv)
        assert all(piece in said for piece in pieces), said


def test_an_exact_model_has_no_weights_to_add_to(tmp_path):
    exact = load_teacher("analytic:gmm2d-flow")
    with pytest.raises(UserError, match="exact model"):
        add_to(exact.backbone, exact, tmp_path / "x.safetensors")
