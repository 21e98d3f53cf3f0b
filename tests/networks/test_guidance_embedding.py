"""Students that take w as an input: no influence at the start, diffusers' own features, exports, refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastgen.cli.sample import Generator, draw, main
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.export.load import load_export
from fastgen.families.parts import rebuilt
from fastgen.families.unet import guidance_features
from fastgen.networks.load import load_teacher
from fastgen.training.assembly import make_cast
from fastgen.training.exporting import export_run
from tests.objectives.test_contract import batch
from tests.support.plain import run_plain
from tests.support.tiny import PROMPTS

W = 4.0
SEEDS = [5, 6]


def make(
    tiny, family, kind="full", span=(1.0, 8.0), method="guidance_distillation", init="", w=W, sampled_w=None
):
    cfg = validate(
        {
            "teacher": {"path": str(tiny(family)), "guidance": w, "num_steps": 4},
            "student": {
                "kind": kind,
                "num_steps": 4,
                "sampler": "ode",
                "guidance_embedding": span,
                "guidance": sampled_w,
                "lora": {"rank": 4, "lora_alpha": 8},
                "init": init,
            },
            "objective": {"name": method},
            "data": {"name": "fashion"},
        }
    )
    cast = make_cast(cfg)
    return cfg, cast, cast.stage(cfg.all_stages()[0], Rng(0))


def moved(cast, kind):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in cast.parts["student"].trainable().items():
            if kind == "full" or "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_student_starts_as_the_teacher_and_learns_w(tiny, kind):
    _, cast, objective = make(tiny, "sd", kind)
    student, teacher, one = cast.parts["student"], cast.parts["teacher"], batch(cast)
    t = torch.full((2,), cast.teacher.schedule.steps(2)[1], dtype=torch.float64)
    plain = load_export(str(tiny("sd"))).role
    ws = [{**one.cond, "guidance": torch.full((2,), w)} for w in (1.0, 6.0)]
    with torch.no_grad():
        before = plain(one.noise, t, one.cond)
        torch.testing.assert_close(teacher(one.noise, t, one.cond), before, rtol=1e-5, atol=1e-5)
        for cond in ws:
            torch.testing.assert_close(student(one.noise, t, cond), before, rtol=1e-5, atol=1e-5)
    names = [n for n in student.trainable() if "cond_proj" in n]
    assert names, "the new layer is not trained"
    loss, _ = next(objective.step(one, 0))
    loss.backward()
    assert any(student.trainable()[n].grad.abs().max() > 0 for n in names)
    moved(cast, kind)
    with torch.no_grad():
        torch.testing.assert_close(teacher(one.noise, t, one.cond), before, rtol=1e-5, atol=1e-5)
        low, high = (student(one.noise, t, cond) for cond in ws)
        assert not torch.allclose(low, high, atol=1e-4), "w has no effect"
        missing = student(one.noise, t, one.cond)  # without w in cond: the run's own guidance
        own = student(one.noise, t, {**one.cond, "guidance": torch.full((2,), W)})
    assert torch.equal(missing, own)


def test_sana_takes_w_beside_its_time(tiny):
    """Full network or adapter: the same function at first whatever w is, and w matters once trained."""
    backbone = load_teacher(str(tiny("sana"))).backbone.requires_grad_(False)
    x, t = torch.randn(2, 4, 16, 16), torch.full((2,), 0.5, dtype=torch.float64)
    cond = {"encoder_hidden_states": torch.randn(2, 5, 8), "encoder_attention_mask": torch.ones(2, 5)}
    with torch.no_grad():
        before = backbone(x, t, cond)
        backbone.add_guidance()
        with_w = [{**cond, "guidance": torch.full((2,), w)} for w in (1.0, 6.0)]
        for one in (cond, *with_w):
            torch.testing.assert_close(backbone(x, t, one), before, rtol=1e-5, atol=1e-5)
        targets = (*backbone.family.lora_targets, *backbone.family.guidance_layers)
        backbone.add_adapter("student", 4, 8, targets)
        for name, parameter in backbone.named_parameters():
            if "guidance_embedder" in name and "lora_B" in name:
                parameter.normal_(0, 0.3)
        torch.testing.assert_close(backbone(x, t, with_w[1]), before, rtol=1e-5, atol=1e-5)
        with backbone.using("student"):
            low, high = (backbone(x, t, one) for one in with_w)
    assert not torch.allclose(low, high, atol=1e-4)


def test_features_are_the_pipelines():
    from diffusers import StableDiffusionPipeline

    w = torch.tensor([1.0, 2.5, 8.0])
    embed = StableDiffusionPipeline.get_guidance_scale_embedding
    theirs = embed(SimpleNamespace(), w - 1, embedding_dim=256)
    assert torch.equal(guidance_features(w, 256), theirs)
    assert torch.equal(guidance_features(w[:1], 256), torch.cat([torch.zeros(1, 128), torch.ones(1, 128)], 1))
    assert (guidance_features(w, 256) - embed(SimpleNamespace(), w, embedding_dim=256)).abs().max() > 0.1


PLAIN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastgen":
            raise ImportError("fastgen may not be imported here")
sys.meta_path.insert(0, Blocked())
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
calls, forward = [], pipe.unet.forward
def counted(x, *args, **kwargs):
    calls.append(len(x))
    return forward(x, *args, **kwargs)
pipe.unet.forward = counted
found = {}
for w in (2.0, 6.0):
    streams = [torch.Generator().manual_seed(s) for s in (5, 6)]
    found[str(w)] = pipe(%r, generator=streams, guidance_scale=w, num_inference_steps=4, height=16,
                         width=16, output_type="pt").images.contiguous()
assert calls == [2] * 8, calls  # one pass a step: w is an input, there is no second pass
save_file(found, "images.safetensors")
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_guidance_scale_of_the_stock_pipeline_drives_the_export(tiny, tmp_path, kind):
    cfg, cast, _ = make(tiny, "sd", kind)
    moved(cast, kind)
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", enlarges=0, folder=tmp_path)
    folder = export_run(run, tmp_path / "export", {})
    loaded = load_export(folder)
    assert loaded.role.guidance_range == (1.0, 8.0) and loaded.role.guidance == W
    (tmp_path / "plain.py").write_text(PLAIN % (list(PROMPTS),))
    where = folder if kind == "full" else folder / "merged"
    done = run_plain("plain.py", where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plain = load_file(tmp_path / "images.safetensors")
    cond, null = loaded.codec.prompts(list(PROMPTS)), loaded.codec.null(1)
    for w in (2.0, 6.0):
        mine = draw(Generator(loaded, 0, w, null), cond, SEEDS, batch_size=2)[0]
        assert (mine - plain[str(w)]).abs().max() < 1e-3
    assert (plain["2.0"] - plain["6.0"]).abs().max() > 1e-2, "w does nothing: nothing was tested"
    card = (folder / "README.md").read_text()
    assert "guidance_scale=4.0" in card and "trained for 1 to 8" in card


def test_a_student_starts_from_an_export_with_or_without_w(tiny, tmp_path):
    cfg, cast, _ = make(tiny, "sd")
    moved(cast, "full")
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", enlarges=0, folder=tmp_path)
    exported = export_run(run, tmp_path / "with_w", {})
    _, again, _ = make(tiny, "sd", init=str(exported))
    for name, value in again.parts["student"].trainable().items():
        assert torch.equal(value, cast.parts["student"].trainable()[name])
    _, fresh, _ = make(tiny, "sd", init=str(tiny("sd")))
    assert not dict(fresh.parts["student"].trainable())["net.time_embedding.cond_proj.weight"].any()


def test_w_outside_the_trained_range_is_warned_of(tiny, tmp_path, capsys):
    cfg, cast, _ = make(tiny, "sd")
    folder = export_run(
        SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", enlarges=0, folder=tmp_path),
        tmp_path / "export",
        {},
    )
    call = ["--model", str(folder), "--prompt", PROMPTS[0], "--guidance"]
    assert main([*call, "9", "--out", str(tmp_path / "a")]) == 0
    assert "--guidance: trained for 1 to 8, sampling with 9" in capsys.readouterr().err
    assert main([*call, "3", "--out", str(tmp_path / "b")]) == 0
    assert "warning" not in capsys.readouterr().err
    assert json.loads((tmp_path / "b/samples.json").read_text())["guidance"] == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"family": "flow"}, "UNet2DModel has no input for the guidance scale"),
        ({"family": "sana"}, "no pipeline passes the guidance scale to a plain SanaTransformer2DModel"),
        ({"method": "dmd2"}, "dmd2 trains teacher.guidance alone"),
        ({"span": (5.0, 8.0)}, r"allowed: \[low, high\] around teacher.guidance 4"),
        ({"span": (8.0, 1.0)}, r"allowed: \[low, high\]"),
        ({"sampled_w": 9.0}, r"around teacher.guidance 4 and student.guidance 9"),
        ({"span": None, "sampled_w": 5.0}, r"student.guidance: found 5 without student.guidance_embedding"),
    ],
)
def test_refusals(tiny, change, message):
    with pytest.raises(UserError, match=message) as error:
        make(tiny, **{"family": "sd", **change})
    assert "student.guidance_embedding" in str(error.value) and "\n" not in str(error.value)


def test_a_student_may_be_sampled_with_more_guidance_than_its_teacher(tiny, tmp_path):
    """student.guidance is what samples of the run use and what the export's description says."""
    found = {}
    for sampled_w in (None, 6.0):
        cfg, cast, objective = make(tiny, "sd", sampled_w=sampled_w)
        moved(cast, "full")
        student, one = cast.parts["student"], batch(cast)
        with torch.no_grad():
            found[sampled_w] = student.generate(one.noise, one.cond, torch.randn_like)
            wanted = student.with_guidance(sampled_w or W).generate(one.noise, one.cond, torch.randn_like)
        torch.testing.assert_close(found[sampled_w], wanted)
        assert objective.guidance == W
        run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", enlarges=0, folder=tmp_path)
        assert load_export(export_run(run, tmp_path / f"{sampled_w}", {})).role.guidance == (sampled_w or W)
    assert not torch.allclose(found[None], found[6.0], atol=1e-4)


def test_it_is_off_by_default():
    assert validate({"objective": {"name": "dmd2"}}).student.guidance_embedding is None


def test_a_config_that_does_not_name_the_input_gets_it_too():
    """As that of every released model: diffusers keeps a value that no file named at its default."""
    from diffusers import SanaTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2}
    sizes |= {"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8}
    net = SanaTransformer2DModel(in_channels=4, out_channels=4, num_layers=1, sample_size=4, **sizes)
    assert "guidance_embeds" in net.config["_use_default_values"], "or this proves nothing"
    again = rebuilt(net, ("time_embed.emb.", "time_embed."), guidance_embeds=True, timestep_scale=1000.0)
    assert again.config.guidance_embeds and again.config.timestep_scale == 1000.0
    assert isinstance(again.time_embed.guidance_embedder.linear_1.weight, torch.Tensor)
    own = net.time_embed.emb.timestep_embedder.linear_1.weight
    assert torch.equal(again.time_embed.timestep_embedder.linear_1.weight, own)
