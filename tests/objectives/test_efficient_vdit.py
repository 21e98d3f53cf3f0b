"""Efficient-vDiT: the search of tile masks, distillation from the dense student, stages and exports."""

import copy
from types import SimpleNamespace

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.networks.tile_attention import attach, attend, evenly, tile_mask
from fastgen.objectives.efficient_vdit import OutputErrors, fewest, layer_distance, outputs
from fastgen.training.assembly import make_cast
from fastgen.training.exporting import export_run
from tests.support.clips import clip_teacher
from tests.support.heavier import first_of
from tests.support.play import batch as batch_for
from tests.support.play import play
from tests.support.replay import moved, plainly
from tests.support.toys import batch_of, rng, run_mixture

SHORT: dict = {}
"""settings of the contract battery"""
STILL = True
"""a picture is dense, and what its student is distilled from is itself"""
CONSISTENCY = {"name": "consistency", "num_scales": 8, "segments": 2}
SPARSE = {"name": "efficient_vdit", "globals": [2], "error": 9.0}
STAGES = [
    {"name": "dense", "max_train_steps": 1, "objective": CONSISTENCY},
    {"name": "sparse", "max_train_steps": 3, "objective": SPARSE},
    {"name": "further", "max_train_steps": 1, "objective": CONSISTENCY},
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return clip_teacher(tmp_path_factory.mktemp("clips"), patch=1)


def values(folder, kind="full", **objective):
    return {
        "teacher": {"path": str(folder), "guidance": 2.0},
        "student": {"kind": kind, "num_steps": 2, "sampler": "ode", "lora": {"rank": 2}},
        "objective": {"name": "efficient_vdit", **objective},
        "data": {"name": "moving"},
    }


def made(folder, kind="full", moves=0.1, **objective):
    """(cast, objective, batch) over a tiny Wan of 9 latent frames, its student no teacher any more."""
    cfg = validate(values(folder, kind, **objective))
    cast = moved(make_cast(cfg), moves)
    return cast, cast.stage(cfg.all_stages()[0], rng()), batch_for(cast)


# -- search --------------------------------------------------------------------------------------------------
def errors_of(*layers, frames=8, tried=()):
    """Errors [layers, tried] of attention between given (query, key, value)."""
    control = SimpleNamespace(frames=frames, names=list(layers))
    found = OutputErrors(control, tried)
    for n, given in enumerate(layers):
        found(n, *given, 0, attend(*given, frames, tuple(range(frames))))
    return found.relative(), found.tried


def by_frame(scale, frames=8, per=3):
    """Attention whose queries look for the keys of their own frame, sharper with the scale: 0 is uniform."""
    generator = torch.Generator().manual_seed(5)
    own = torch.eye(frames).repeat_interleave(per, 0)[None, :, None]
    noise = torch.randn(1, frames * per, 1, frames, generator=generator)
    return scale * own, scale * own, noise


def test_p1_block_diagonal_attention_gets_the_sparsest_mask_and_uniform_attention_none():
    errors, tried = errors_of(by_frame(20.0), by_frame(0.0))
    assert errors[0].max() < 1e-6 and errors[1, 0] > 0.5
    assert fewest(errors, tried, 8, 0.05)[0] == 1
    assert fewest(errors[1:], tried[:4], 8, 0.05) == [8], "of the numbers tried none will do: dense"


def test_p1_negative_the_distance_of_maps_keeps_uniform_attention_sparse():
    """Mean squares of maps are small because there are many entries; the output still is another one."""
    errors, _ = errors_of(by_frame(0.0))
    full = torch.full((24, 24), 1 / 24)
    kept = tile_mask(8, (0,)).repeat_interleave(3, 0).repeat_interleave(3, 1)
    masked = kept / kept.sum(1, keepdim=True)
    assert (full - masked).square().mean() < 0.05 < errors[0, 0]


def test_p1_a_larger_error_never_gives_a_denser_mask_and_none_keeps_all_dense():
    generator = torch.Generator().manual_seed(2)
    layers = [
        tuple(s * x for s, x in zip((a, a, 1), torch.randn(3, 2, 24, 2, 16, generator=generator)))
        for a in (0.2, 1.0, 3.0)
    ]
    errors, tried = errors_of(*layers, tried=(1, 2, 3, 4, 6))
    chosen = [fewest(errors, tried, 8, r) for r in (0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 1e9)]
    assert chosen[0] == [8, 8, 8] and chosen[-1] == [1, 1, 1]
    assert all(a >= b for one, next_ in zip(chosen, chosen[1:]) for a, b in zip(one, next_))
    assert len({tuple(one) for one in chosen}) > 3


def test_p1_errors_add_up_over_calls_by_the_size_of_the_outputs():
    one, other = by_frame(20.0), by_frame(0.0)
    control = SimpleNamespace(frames=8, names=["a"])
    found = OutputErrors(control, (1,))
    sums = torch.zeros(2)
    for given in (one, other):
        out, masked = attend(*given, 8, tuple(range(8))), attend(*given, 8, evenly(8, 1))
        found(0, *given, 0, out)
        sums += torch.stack([(out - masked).square().sum(), out.square().sum()])
    torch.testing.assert_close(found.relative()[0, 0].float(), sums[0] / sums[1])


def test_p1_the_search_sees_a_dense_network_at_every_time(clip_folder):
    """Also where it had masks; then each layer has the fewest that will do, and the masks act."""
    cast, objective, one = made(clip_folder, calibration_times=3, error=0.5)
    student, control = cast.student, objective.control
    control.plan().copy_(torch.tensor([9, 1, 1]))
    seen, t = [], torch.full((2,), 0.5, dtype=torch.float64)
    call = type(student.backbone).raw
    student.backbone.raw = lambda x, t, c: (
        seen.append((t[0].item(), control.plan().sum().item())),
        call(student.backbone, x, t, c),
    )[1]
    objective.search(one)
    assert seen == [(time, 0) for time in objective.schedule.steps(3)]
    frames, *layers = control.plan().tolist()
    assert frames == 9 and all(1 <= m <= 9 for m in layers)
    with torch.no_grad():
        sparse = student(one.noise, t, one.cond)
        control.plan().zero_()
        assert (sparse - student(one.noise, t, one.cond)).abs().max() > 1e-4


# -- distillation --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_p1_step_is_the_formula(clip_folder, kind):
    """Against two networks of their own, the one dense and the other under the masks that were found."""
    cast, objective, one = made(clip_folder, kind, globals=[2], error=9.0, layer_weight=0.7)
    name, kept, calls = cast.student.adapter, copy.deepcopy(cast.student.backbone), []
    call, randn_like, drawn = type(kept).raw, objective.rng.randn_like, []
    objective.rng.randn_like = lambda x: (drawn.append(randn_like(x)), drawn[-1])[1]
    for net in {id(r.backbone): r.backbone for r in (cast.student, cast.parts["previous"])}.values():
        net.raw = lambda x, t, c, net=net: (
            calls.append((net.adapter, torch.is_grad_enabled(), x, t)),
            call(net, x, t, c),
        )[1]
    loss, logs = next(objective.step(one, 0))
    (before, plain, same, _), (who, graded, x_t, t) = calls[-2:]
    assert (who, graded) == (name, True) and (before, plain) == (name and "previous", False)
    assert torch.equal(same, x_t) and set(t.tolist()) <= set(cast.student.times)
    at = t[:, None, None, None, None].float()
    torch.testing.assert_close(x_t, (1 - at) * one.x0 + at * drawn[-1])
    assert objective.control.plan(name).tolist() == [9, 2, 2] and logs["tiles"] == pytest.approx(39 / 81)

    def answer(*plan):
        """Prediction and attention outputs of a network of its own."""
        kept.in_tiles(name).plan(name).copy_(torch.tensor(plan))
        found = []
        layers = [block.attn1 for block in kept.net.blocks]
        hooks = [one.register_forward_hook(lambda m, a, out: found.append(out)) for one in layers]
        with kept.using(name):
            v = call(kept, x_t, t, one.cond)
        for hook in hooks:
            hook.remove()
        return v, found

    own = {n: p.requires_grad_() for n, p in kept.named_weights().items() if n in cast.student.trainable()}
    v, outs = answer(9, 2, 2)
    with torch.no_grad():
        v_dense, outs_dense = answer(0, 0, 0)
    final = (v - v_dense).square().mean()
    each = [(a - b).square().sum() / b.square().sum() for a, b in zip(outs, outs_dense)]
    wanted = final + 0.7 * sum(each) / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-7)
    assert final > 1e-6 and sum(each) > 1e-3
    grads = [
        torch.autograd.grad(x, list(ps.values()), allow_unused=True)
        for x, ps in ((loss, cast.student.trainable()), (wanted, own))
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_p1_of_dense_masks_there_is_nothing_to_distil(clip_folder):
    """error 0 keeps every layer dense: no loss and no gradient at first. Under masks there are both."""
    found = {}
    for error in (0.0, 9.0):
        cast, objective, one = made(clip_folder, error=error)
        loss, logs = next(objective.step(one, 0))
        loss.backward()
        grads = [p.grad for p in cast.student.trainable().values() if p.grad is not None]
        found[error] = float(loss.detach()), max(float(g.abs().max()) for g in grads), logs["tiles"]
    assert found[0.0] == (0.0, 0.0, 1.0)
    assert found[9.0][0] > 1e-4 and found[9.0][1] > 1e-5 and found[9.0][2] == pytest.approx(25 / 81)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_p1_the_student_alone_is_sparse_and_moves_toward_the_dense_one(clip_folder, kind):
    cast, objective, one = made(clip_folder, kind, error=9.0)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        dense, teacher = cast.student(one.noise, t, one.cond), cast.parts["teacher"](one.noise, t, one.cond)
    assert {p for p, _ in play(objective, one, 0, check=True)} == {"student"}
    with torch.no_grad():
        assert torch.equal(cast.parts["previous"](one.noise, t, one.cond), dense)
        assert torch.equal(cast.parts["teacher"](one.noise, t, one.cond), teacher)
        assert not torch.equal(cast.student(one.noise, t, one.cond), dense)
    losses, optimizer = [], torch.optim.Adam(cast.student.trainable().values(), 1e-3)
    for _ in range(12):
        objective.rng.reset(3)  # one and the same state
        loss, _ = next(objective.step(one, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0], losses


def test_p1_times_are_the_students_own_or_those_of_the_grid_before(clip_folder):
    _, objective, _ = made(clip_folder)
    assert objective.times().tolist() == [1.0, 0.5]
    _, objective, _ = made(clip_folder, grid_steps=4)
    assert objective.times().tolist() == [1.0, 0.75, 0.5, 0.25]


def test_p1_layers_count_alike_whatever_their_scale():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert layer_distance([1.1 * x, 5.5 * x], [x, 5 * x]).item() == pytest.approx(0.01, rel=1e-4)
    assert layer_distance([], []) == 0


def test_a_picture_has_one_tile(tiny):
    from tests.objectives.test_contract import make

    _, cast, objective = make("efficient_vdit", tiny("sd"))
    assert objective.control is None and objective.kept() == 1
    with outputs(cast.student) as found:
        cast.student(
            torch.zeros(2, *cast.teacher.codec.shape), torch.full((2,), 500.0).double(), batch_for(cast).cond
        )
    assert found == []


def test_p2_a_stage_after_consistency_keeps_the_mixture(tmp_path):
    """An exact teacher has no frames: the stage distils the student from itself, to the same samples. From
    another network than the student it leads to that one.
    """
    dense = {"name": "consistency", "num_scales": 16, "segments": 1}
    stages = [(dense, 120, 1), ({"name": "efficient_vdit"}, 3, 1)]
    before, after, x, trainer = run_mixture(tmp_path, None, stages=stages, lr=2e-3, batch=128)
    assert after < 0.05 and after < before / 2, (before, after)
    objective = trainer.objective
    objective.follow = lambda part: None
    for p in objective.previous.trainable().values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    one, losses = batch_of(torch.randn(256, 2)), []
    for _ in range(40):
        losses.append(play(objective, one, 1)[0][1])
    assert losses[0] > 1e-3 and losses[-1] < losses[0] / 2, losses


# -- stages and exports --------------------------------------------------------------------------------------
PLAIN = """
import json, torch, diffusers
from tile_attention import load_tiles
pipe = diffusers.WanPipeline.from_pretrained(BASE or ".", torch_dtype=torch.float32)
if BASE:
    pipe.load_lora_weights(".", weight_name=json.load(open("fastgen.json"))["export"]["lora"])
pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(".", subfolder="scheduler")
call = dict(height=32, width=32, max_sequence_length=16, num_inference_steps=2, guidance_scale=1.0)
def draw():
    generator = [torch.Generator().manual_seed(s) for s in (11, 12)]
    found = pipe(PROMPTS, num_frames=8, generator=generator, output_type="pt", **call)
    return found.frames.float().transpose(1, 2)
dense = draw()
load_tiles(pipe.transformer, ".")
images = torch.cat([draw(), dense], 2)
try:
    pipe(PROMPTS, num_frames=4, **call)
except ValueError as error:
    assert "masks of 9 latent frames, and a clip of 5" in str(error), error
else:
    raise AssertionError("masks of other frames were taken")
"""


@pytest.mark.parametrize("kind", first_of(["full", "lora"]))
def test_p4_efficient_vdit(clip_folder, tmp_path, kind):
    """WanPipeline and the export's own loader: the same clip, another one without masks; frames are checked.
    The next run takes the masks over.
    """
    from fastgen.cli.sample import Generator, draw
    from fastgen.data import moving
    from fastgen.export.load import load_export

    cast, objective, one = made(clip_folder, kind, error=9.0, globals=[2])
    next(objective.step(one, 0))
    run = SimpleNamespace(
        cast=cast, train_cfg=cast.train_cfg, step=1, example="", enlarges=0, folder=tmp_path
    )
    folder = export_run(run, tmp_path / "export", {})
    loaded = load_export(str(folder))
    prompts, base = moving.captions([0, 1], "heldout"), str(clip_folder) if kind == "lora" else ""
    given = f"PROMPTS, BASE = {prompts!r}, {base!r}\n"
    theirs, dense = plainly(given + PLAIN, folder).split(9, 2)
    ours = draw(Generator(loaded, 0, 1.0, {}), loaded.codec.prompts(prompts), [11, 12], 2)[0]
    assert (theirs - ours).abs().max() < 1e-3
    assert (theirs - dense).abs().max() > 1e-2, "the masks do not show"
    card = (folder / "README.md").read_text()
    assert loaded.info.tiles == pytest.approx(39 / 81) and "48% of the tiles" in card

    further = values(clip_folder, kind)
    further["student"]["init"] = str(folder)
    again, t = make_cast(validate(further)), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        sparse = cast.student(one.noise, t, one.cond)
        torch.testing.assert_close(again.student(one.noise, t, one.cond), sparse, rtol=0, atol=1e-5)
    wanted = "13 latent frames, and the tile masks of .* were searched at 9; give 9 frames"
    with pytest.raises(UserError, match=wanted) as found:
        load_export(str(folder), size={"num_frames": 13})
    assert found.value.key == "teacher.num_frames"
    further["teacher"]["num_frames"] = 13
    with pytest.raises(UserError, match="student.init: " + wanted):
        make_cast(validate(further))
    (folder / "tile_masks.json").write_text("{}")
    with pytest.raises(
        UserError, match="tile_masks.json has no tile masks of format 1; export the run again"
    ):
        load_export(str(folder))


def test_stages_of_one_config_resume_with_their_masks(clip_folder, tmp_path):
    """Cut within the sparse stage, at its end and in the stage after: the same masks and weights."""
    from accelerate import Accelerator

    from fastgen.data.loader import load_data
    from fastgen.training.assembly import make_trainer

    one = values(clip_folder)
    del one["objective"]
    train = {"train_batch_size": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 9, "ema_decay": []}
    cfg = validate({**one, "stages": STAGES, "train": train})

    def run(resume=None):
        cast = make_cast(cfg)
        trainer = make_trainer(cfg, cast, load_data(cfg.data, cast.teacher), tmp_path, Accelerator(cpu=True))
        trainer.fit(resume)
        return cast.student

    whole = run()
    plan = attach(whole.backbone.net).plan().tolist()
    assert plan == [9, 2, 2]
    state = {n: p.clone() for n, p in whole.trainable().items()}
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert len(saved) == 5
    for folder in saved[2:]:
        again = run(folder)
        assert attach(again.backbone.net).plan().tolist() == plan, folder
        assert all(torch.equal(p, state[n]) for n, p in again.trainable().items()), folder


# -- mistakes ------------------------------------------------------------------------------------------------
def test_networks_without_tiles_are_refused(tmp_path):
    from tests.families.cases.video import hunyuan_video

    cfg = validate({**values(hunyuan_video(tmp_path)), "teacher": {"path": str(tmp_path)}})
    with pytest.raises(UserError, match="found efficient_vdit for HunyuanVideoTransformer3DModel"):
        make_cast(cfg, "meta").stage(cfg.all_stages()[0], rng())
