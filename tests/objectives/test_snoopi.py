"""SNOOPI: random guidance keeps the mean gradient; NASA subtracts exactly the negative's attention."""

import shutil

import numpy as np
import pytest
import torch
import yaml

from fastgen.cli.train import main
from fastgen.diffusion.schedules import VP
from fastgen.networks import negative_prompts
from fastgen.objectives.snoopi import Snoopi, SnoopiConfig
from tests.objectives.test_swiftbrush import parts
from tests.support.replay import plainly, replay
from tests.support.toys import CountingRole, batch_of, run_mixture

SHORT = {"min_guidance": 0.5, "max_guidance": 3.0}
"""settings of the contract battery"""


class Recorder(CountingRole):
    """A Gaussian denoiser that the condition shifts, so that guidance has something to act on."""

    def __call__(self, x_t, t, cond):
        return super().__call__(x_t, t, cond) + 0.3 * cond["shift"][:, None] * self.backbone.s


def gradient(low, high, seed, num=4096):
    """The student's gradient in its mean at w ~ U(low, high)."""
    from fastgen.core.rng import Rng

    S = VP.scaled_linear()
    players = parts(S)
    players = {n: Recorder(p.backbone) if n != "student" else p for n, p in players.items()}
    objective = Snoopi(SnoopiConfig(min_guidance=low, max_guidance=high), players, Rng(seed))
    noise = torch.randn(num, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batch = batch_of(noise, noise, {"shift": torch.ones(num, dtype=torch.float64)})
    batch.uncond = {"shift": torch.zeros(num, dtype=torch.float64)}
    loss, _ = next(objective.step(batch, 0))
    return float(torch.autograd.grad(loss, players["student"].backbone.m)[0])


def test_p1_random_guidance_keeps_the_mean_gradient():
    """The gradient is linear in w: its mean over w ~ U(a, b) is the one at (a + b) / 2."""
    drawn = torch.tensor([gradient(0.5, 4.0, seed) for seed in range(12)])
    fixed = torch.tensor([gradient(2.25, 2.25, seed) for seed in range(12)])
    spread = max(float(drawn.std()), float(fixed.std())) / 12**0.5
    assert abs(drawn.mean() - fixed.mean()) < 4 * spread, (drawn.mean(), fixed.mean(), spread)
    other = torch.tensor([gradient(4.0, 4.0, seed) for seed in range(12)])  # negative: another mean w
    assert abs(other.mean() - fixed.mean()) > 8 * spread


def test_p1_guidance_is_drawn_per_sample_within_the_range():
    seen = []

    class Watched(CountingRole):
        def guided(self, x_t, t, cond, uncond, w):
            seen.append(w)
            return super().__call__(x_t, t, cond)

    S = VP.scaled_linear()
    players = {n: Watched(p.backbone) if n != "student" else p for n, p in parts(S).items()}
    from fastgen.core.rng import Rng

    objective = Snoopi(SnoopiConfig(), players, Rng(0))
    next(objective.step(batch_of(torch.zeros(256, 1), torch.randn(256, 1).double()), 0))
    teacher, critic = seen
    assert torch.equal(teacher, critic), "one w for teacher and critic"
    assert 0.5 <= teacher.min() < 0.7 and 3.8 < teacher.max() <= 4.0 and len(teacher.unique()) > 250


def test_a_range_upside_down_is_refused():
    with pytest.raises(ValueError, match="min_guidance"):
        SnoopiConfig(min_guidance=3, max_guidance=1)


def networks(tiny):
    """(name, denoiser, its call, a negative's states and mask, number of attentions to text)."""
    from diffusers import SanaTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    unet = UNet2DConditionModel.from_pretrained(tiny("sd") / "unet").eval()
    call = {"sample": randn(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": randn(2, 9, 32)}
    yield "sd", unet, call, (randn(1, 6, 32), None), 4
    sana = SanaTransformer2DModel.from_pretrained(tiny("sana") / "transformer").eval()
    call = {"hidden_states": randn(2, 4, 16, 16), "timestep": torch.full((2,), 500.0)}
    call |= {"encoder_hidden_states": randn(2, 9, 8), "encoder_attention_mask": torch.ones(2, 9)}
    mask = torch.tensor([[1.0, 1, 1, 0, 0, 0]])
    yield "sana", sana, call, (randn(1, 6, 8), mask), 2
    torch.manual_seed(0)
    sizes = {
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "qk_norm": "rms_norm",
    }
    sd3 = SD3Transformer2DModel(
        8, 2, 4, num_layers=2, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, **sizes
    ).eval()
    for p in sd3.parameters():
        if not p.any():
            torch.nn.init.normal_(p, 0, 0.05)
    call = {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 5, 16)}
    call |= {"pooled_projections": randn(2, 8), "timestep": torch.full((2,), 500.0)}
    yield "sd3", sd3, call, (randn(1, 7, 16), None), 2


@torch.no_grad()
def test_p1_scale_zero_and_removal_leave_every_network_as_it_was(tiny):
    for name, net, call, (states, mask), layers in networks(tiny):
        plain = net(**call).sample
        assert negative_prompts.attach(net, states, 0.0, mask) == layers, name
        assert torch.equal(net(**call).sample, plain), name
        negative_prompts.attach(net, states, 0.7, mask)
        assert not torch.allclose(net(**call).sample, plain, atol=1e-4), name
        negative_prompts.remove(net)
        assert torch.equal(net(**call).sample, plain), name
        processors = [type(m.processor).__module__ for m in net.modules() if hasattr(m, "processor")]
        assert "fastgen.networks.negative_prompts" not in processors


def attention_inputs(net, call):
    """What enters the output projection of the first cross-attention."""
    layer = next(m for n, m in net.named_modules() if n.endswith("attn2")).to_out[0]
    seen = []
    # registered last, so it sees what NASA's own hook leaves
    before = layer.forward
    layer.forward = lambda x, *a: (seen.append(x.detach()), before(x, *a))[1]
    try:
        net(**call)
    finally:
        del layer.forward
    return seen[-1]


@torch.no_grad()
def test_p1_the_subtraction_is_linear_and_before_the_projection(tiny):
    """Z(scale) = Z+ - scale Z-, and with the positive prompt as negative Z = (1 - scale) Z+."""
    for name, net, call, (states, mask), _ in networks(tiny):
        if name == "sd3":
            continue
        inputs = {}
        for scale in (0.0, 0.5, 1.0):
            negative_prompts.attach(net, states, scale, mask)
            inputs[scale] = attention_inputs(net, call)
            negative_prompts.remove(net)
        removed = inputs[0.0] - inputs[1.0]
        torch.testing.assert_close(inputs[0.0] - inputs[0.5], 0.5 * removed, rtol=1e-4, atol=1e-5)
        own = {**call, "encoder_hidden_states": call["encoder_hidden_states"][:1].expand(2, -1, -1)}
        negative_prompts.attach(
            net, own["encoder_hidden_states"][:1], 0.3, torch.ones(1, 9) if mask is not None else None
        )
        same = attention_inputs(net, own)
        negative_prompts.remove(net)
        torch.testing.assert_close(same, 0.7 * attention_inputs(net, own), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_p1_masked_negative_tokens_do_nothing(tiny):
    _, net, call, (states, mask), _ = list(networks(tiny))[1]
    other = states.clone()
    other[:, 3:] += 5.0
    outputs = []
    for given, tokens in ((states, mask), (other, mask), (other, torch.ones_like(mask))):
        negative_prompts.attach(net, given, 0.5, tokens)
        outputs.append(net(**call).sample)
        negative_prompts.remove(net)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4), "unmasked they count"


def test_a_network_without_text_is_refused(tiny):
    from diffusers import UNet2DModel

    with pytest.raises(ValueError, match="neither cross- nor joint"):
        negative_prompts.attach(UNet2DModel.from_pretrained(tiny("flow") / "unet"), torch.zeros(1, 3, 8), 0.5)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("snoopi")
    (folder / "prompts.txt").write_text("a red dress\na blue bag\n")
    values = {
        "teacher": {"path": str(tiny("sd")), "guidance": 2.0},
        "student": {"kind": "full"},
        "critic": {"kind": "lora", "lora": {"rank": 2}},
        "data": {"name": "", "prompts": str(folder / "prompts.txt")},
        "objective": {"name": "snoopi", "nasa_scale": 0.7},
        "optim": {"student": {"lr": 1e-2}},
        "train": {"max_train_steps": 2, "train_batch_size": 2, "validation_steps": 0, "ema_decay": [0.5]},
        "eval": {"num_samples": 0},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(folder / "run.yaml"), "--output_dir", str(folder / "run")]) == 0
    return folder / "run/export"


PLAIN = """
import torch
from diffusers import StableDiffusionPipeline
from nasa import negative_prompt
pipe = StableDiffusionPipeline.from_pretrained(".", torch_dtype=torch.float32)
call = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
draw = lambda: pipe("a red dress", generator=torch.Generator().manual_seed(5), **call).images
plain = draw()
negative_prompt(pipe, "red", scale=0.7)
images = torch.cat([plain, draw()])
"""


def test_p4_snoopi_negative_prompt_in_plain_diffusers(exported, tmp_path, capsys):
    """nasa.py beside the export and two lines of code draw what sample.py draws with --negative_prompt."""
    from PIL import Image

    from fastgen.cli.sample import main as sample

    work = tmp_path / "work"
    shutil.copytree(exported, work)
    assert "negative_prompt(pipe" in (work / "README.md").read_text()
    images = plainly(PLAIN, work)
    assert (images[0] - images[1]).abs().max() > 1e-3, "the negative prompt acts"
    for i, flags in enumerate(([], ["--negative_prompt", "red"])):
        out = tmp_path / f"out{i}"
        arguments = ["--model", str(exported), "--prompt", "a red dress", "--seed", "5", "--out", str(out)]
        assert sample([*arguments, *flags]) == 0
        drawn = torch.from_numpy(np.array(Image.open(out / "00000_5.png"))).permute(2, 0, 1) / 255
        assert (drawn - images[i]).abs().max() < 1.5 / 255
    assert "no effect" not in capsys.readouterr().err


def test_negative_prompt_of_a_student_without_nasa_is_warned_of(exported, tmp_path, capsys):
    import json

    from fastgen.cli.sample import main as sample

    work = tmp_path / "work"
    shutil.copytree(exported, work)
    document = json.loads((work / "fastgen.json").read_text())
    document["export"]["nasa_scale"] = 0.0
    (work / "fastgen.json").write_text(json.dumps(document))
    arguments = ["--model", str(work), "--prompt", "a red dress", "--negative_prompt", "red"]
    assert sample([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert "--negative_prompt has no effect" in capsys.readouterr().err
    assert sample([*arguments, "--nasa_scale", "0.5", "--out", str(tmp_path / "b")]) == 0
    assert "no effect" not in capsys.readouterr().err
    assert (tmp_path / "a/grid.png").read_bytes() != (tmp_path / "b/grid.png").read_bytes()


@pytest.mark.slow
def test_p2_distils_the_mixture(tmp_path):
    objective = {"name": "snoopi", "student_every": 2, "min_guidance": 0.7, "max_guidance": 1.3}
    before, after, *_ = run_mixture(tmp_path, objective, "analytic:gmm2d-vp", steps=300)
    assert after < 0.04 and after < before / 3, (before, after)


def test_p4_snoopi(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "snoopi"})


def test_a_negative_prompt_removes_the_named_colour():
    """On the bundled captioned network: red things with the negative prompt "red" are hardly drawn."""
    from fastgen.data.bundled import VOCABULARY, all_captions, attributes_of
    from fastgen.evaluation.metrics.agreement import agreement
    from fastgen.evaluation.metrics.fd_mini import Measurer
    from fastgen.export.load import load_export
    from fastgen.networks.feature_net import measure
    from fastgen.sampling.solvers import ImageNoise, sample_teacher

    loaded = load_export("assets:teachers/tinted-sd")
    captions = [c for c in all_captions() if " red " in c and "grey" in c][:8]
    ids = {k: torch.tensor([attributes_of(c)[k] for c in captions]) for k in VOCABULARY}
    cond, null = loaded.codec.prompts(captions), loaded.codec.null(len(captions))
    noise = ImageNoise(list(range(len(captions))), loaded.codec.shape).first
    states, seen = loaded.codec.prompts(["red"])["encoder_hidden_states"], {}
    for scale in (0.0, 1.0):
        negative_prompts.attach(loaded.role.backbone.net, states, scale)
        images = loaded.codec.decode(sample_teacher(loaded.role, noise, cond, null, 6))
        negative_prompts.remove(loaded.role.backbone.net)
        seen[scale] = agreement(measure(Measurer("tinted").net, images)["logits"], ids)
    assert seen[0.0]["agreement_colour"] >= 0.9 and seen[1.0]["agreement_colour"] <= 0.2, seen
    assert seen[1.0]["agreement_background"] >= 0.9 and seen[1.0]["agreement_garment"] >= 0.5, seen


def test_removal_is_measured_of_students_asked_by_text_only(tiny):
    from eval.negative import removal
    from fastgen.core.errors import UserError

    with pytest.raises(UserError, match="no text-to-image student"):
        removal(str(tiny("flow")))
