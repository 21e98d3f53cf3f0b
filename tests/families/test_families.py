"""One battery over every family: what each declaration promises, at tiny size, against diffusers itself."""

import copy
import json

import diffusers
import pytest
import torch
from torch import nn

from fastgen.diffusion.schedules import EDM
from fastgen.export import lora
from fastgen.export.load import load_export
from fastgen.families.registry import FAMILIES
from fastgen.networks.attention import exact_attention
from fastgen.roles.roles import Role
from fastgen.training.exporting import export_run
from tests.families.cases import CASES
from tests.families.world import (
    SHORT,
    draws,
    label_loop,
    network_of,
    open_pipeline,
    plain_call,
    scheduler_x0,
    untrained,
)

each = pytest.mark.parametrize("name", sorted(CASES))


def excuse(world, check: str) -> None:
    if check in world.case.excused:
        pytest.skip(world.case.excused[check])


# -- the network as a denoiser ------------------------------------------------------------------------------
@each
def test_x0_is_the_schedulers(world):
    """D from the network equals the scheduler's own pred_original_sample at five times."""
    for t in world.times():
        t2 = t.expand(2)
        x_t = world.schedule.noise(world.x0, world.noise, t2)
        with torch.no_grad():
            D = world.backbone(x_t, t2, world.cond)
            out = world.backbone.raw(x_t, t2, world.cond)
        theirs = scheduler_x0(world.teacher.scheduler, out, x_t, t, world.schedule)
        torch.testing.assert_close(D, theirs, rtol=1e-5, atol=1e-5)
        assert D.abs().max() > 1e-3 and out.abs().max() > 1e-4, "the tiny network is dead: perturb its zeros"


@each
def test_guidance_ends(world):
    """w = 1 is the conditional estimate, w = 0 the unconditional one, and the two differ."""
    role, t = Role(world.backbone), world.level()
    x_t = world.schedule.noise(world.x0, world.noise, t)
    ones = torch.ones(2)
    with torch.no_grad():
        D, D_null = role(x_t, t, world.cond), role(x_t, t, world.uncond)
        torch.testing.assert_close(
            role.guided(x_t, t, world.cond, world.uncond, ones), D, rtol=1e-5, atol=1e-5
        )
        zero = role.guided(x_t, t, world.cond, world.uncond, 0 * ones)
        torch.testing.assert_close(zero, D_null, rtol=1e-5, atol=1e-5)
    excuse(world, "guidance")
    assert (D - D_null).abs().max() > 1e-6


def gradients(world, checkpointing: bool):
    """(gradient of x, gradients by name) of one pass through a copy of the network."""
    backbone = copy.deepcopy(world.backbone).requires_grad_(True)
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    t = world.times(2)  # far apart: two experts each have their side
    x_t = world.schedule.noise(world.x0, world.noise, t).requires_grad_(True)
    (backbone(x_t, t, world.cond) * world.noise).sum().backward()
    return x_t.grad, {n: p.grad for n, p in backbone.net.named_parameters()}


@each
def test_gradient_reaches_everything(world):
    """x and every parameter, but for the exceptions that the family documents."""
    to_x, to_weights = gradients(world, False)
    assert to_x is not None and torch.isfinite(to_x).all() and to_x.abs().max() > 0
    sizes = {n: 0.0 if g is None else float(g.abs().max()) for n, g in to_weights.items()}
    dead = {n for n, size in sizes.items() if not size}
    declared = {n for n in to_weights if world.family.is_unreached(n, world.backbone.net)}
    alive = {n for n in declared if sizes[n] > 1e-8 * max(sizes.values())}  # more than rounding
    assert dead <= declared and not alive, (sorted(dead - declared)[:8], sorted(alive)[:8])


@each
def test_checkpointed_gradients_are_the_plain_ones(world):
    excuse(world, "checkpointing")
    plain, recomputed = gradients(world, False), gradients(world, True)
    torch.testing.assert_close(recomputed[0], plain[0], rtol=1e-4, atol=1e-6)
    for key, gradient in plain[1].items():
        if gradient is not None:
            torch.testing.assert_close(recomputed[1][key], gradient, rtol=1e-4, atol=1e-6)


@each
def test_features_have_the_declared_shapes(world):
    taps = tuple(range(len(world.family.taps(world.backbone.net))))
    channels = world.family.feature_channels(world.backbone.net)
    t = world.level()
    with torch.no_grad():
        maps, D = world.backbone.features(world.noise, t, world.cond, taps=taps, score=True)
        alone, _ = world.backbone.features(
            world.noise, t, world.cond, world.family.default_taps(world.backbone.net)
        )
        torch.testing.assert_close(D, world.backbone(world.noise, t, world.cond))
    assert [m.shape[1] for m in maps] == channels
    assert all(m.ndim == 4 and len(m) == 2 for m in maps)
    default = [range(len(taps))[i] for i in world.family.default_taps(world.backbone.net)]
    for one, index in zip(alone, default):
        torch.testing.assert_close(one, maps[index])


@each
def test_tangent_against_central_differences(world):
    """Forward-mode derivative of the network along (x, time), under the math attention kernel."""
    excuse(world, "jvp")
    net = copy.deepcopy(world.backbone.net).double()
    cond = {k: v.double() if v.is_floating_point() else v for k, v in world.cond.items()}
    time = world.backbone.net_time(world.level()).double()
    h = {"t1000": 0.1, "unit": 1e-4, "reversed": 1e-4}[world.family.flow_time]
    h = 1e-4 * max(1.0, world.family.edm_time) if isinstance(world.schedule, EDM) else h
    dx, dt = 1e-3 / h * world.noise.double(), torch.ones(2, dtype=torch.float64)

    def f(x, s):
        return world.family.call(net, x, s, cond)

    with torch.no_grad(), exact_attention():
        _, tangent = torch.func.jvp(f, (world.x0.double(), time), (dx, dt))
        x = world.x0.double()
        central = (f(x + h * dx, time + h * dt) - f(x - h * dx, time - h * dt)) / (2 * h)
    error = (tangent - central).norm() / central.norm()
    assert error < 5e-3, float(error)


@each
def test_latents_go_both_ways(world):
    """Encoded images have x0's shape, and normalising undoes denormalising."""
    excuse(world, "encode")
    codec, family = world.codec, world.family
    with torch.no_grad():
        images = world.seen(world.x0) * 2 - 1
        assert codec.encode(images).shape == world.x0.shape
        if codec.vae is not None:
            z = family.denormalise(codec.vae, world.x0)
            torch.testing.assert_close(family.normalise(codec.vae, z), world.x0, rtol=1e-4, atol=1e-4)


# -- roles and objectives -----------------------------------------------------------------------------------
@each
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_objectives_step(world, kind):
    """One DMD2, one consistency and one sft step: finite, the student moves, nobody else does. A family that
    begins elsewhere than at noise takes the methods that know it.
    """
    t, start = world.times(2), None  # far apart: two experts each have their side
    for objective in SHORT if world.family.begins_at_noise else ("oftsr", "sft"):
        cast, method = world.cast(objective, kind)
        roles = {n: r for n, r in cast.parts.items() if n in ("teacher", "student", "critic")}
        before = {n: r(world.noise, t, world.cond).detach() for n, r in roles.items()}
        start = start if start is not None else world.backbone(world.noise, t, world.cond).detach()
        for found in before.values():  # whoever shares the base, or holds a copy, starts as the teacher
            torch.testing.assert_close(found, start, rtol=1e-5, atol=1e-5)
        players = []
        for loss, _ in method.step(world.batch(), 0):
            assert torch.isfinite(loss), objective
            loss.backward()
            player = method.players[method.active]
            moved = 0
            for parameter in player.trainable().values():
                if parameter.grad is not None:
                    parameter.data -= 1e-2 * parameter.grad.sign()
                    moved += 1
                    parameter.grad = None
            assert moved, objective
            players.append(method.active)
            if players == ["student"]:
                with torch.no_grad():
                    after = {n: r(world.noise, t, world.cond) for n, r in roles.items()}
                assert not torch.equal(after["student"], before["student"])
                shared = objective == "sft" and kind == "full"  # no second role: the student is the network
                for name in after.keys() - {"student"} if not shared else ():
                    assert torch.equal(after[name], before[name]), f"{name} moved in the student's turn"
        assert players


# -- what leaves the framework ------------------------------------------------------------------------------
@pytest.fixture
def exported(world, tmp_path):
    """A full student of four steps and a LoRA student, written as a user would ship them."""

    def write(kind: str, num_steps: int = 4):
        trainer = world.trainer(kind, num_steps, world.case.sampler)
        return trainer.cast.parts["student"], export_run(trainer, tmp_path / kind, {})

    return write


@each
def test_our_sampler_is_the_exported_pipeline(world, exported, record_property):
    """K steps from the same noise: our sampler, the reloaded export in our code, and diffusers alone."""
    student, folder = exported("full")
    info = json.loads((folder / "fastgen.json").read_text())["export"]
    record_property("scheduler", info["scheduler"]["_class_name"])
    with torch.no_grad():
        ours = world.seen(student.generate(world.noise, world.cond, draws()))
        loaded = load_export(folder)
        t = world.level()
        same = loaded.role.raw(world.noise, t, world.cond)
        torch.testing.assert_close(same, student.raw(world.noise, t, world.cond), rtol=0, atol=0)
        pipe = open_pipeline(folder)
        how = world.case.plain or (label_loop if world.family.kind == "labels" else plain_call)
        theirs = how(world, pipe, info, world.noise)
    assert theirs.shape == ours.shape, (theirs.shape, ours.shape)
    assert (theirs - ours).abs().max() < 1e-4
    before = world.seen(untrained(world, student))
    assert (before - ours).abs().max() > 1e-3, "the student does not differ from its teacher"


@each
def test_lora_file_in_a_fresh_pipeline(world, exported):
    """The adapter, read by the pipeline's own loader (or ours where it has none), gives the student's
    output; wrong prefixes are ignored in silence, so the output must also differ from the base's.
    """
    student, folder = exported("lora")
    info = json.loads((folder / "fastgen.json").read_text())["export"]
    t = world.level()
    files = [info["lora"], *([info["kohya"]] if world.family.kohya_prefix else [])]
    with torch.no_grad():
        wanted, base = student.raw(world.noise, t, world.cond), world.backbone.raw(world.noise, t, world.cond)
        for file in files:
            pipe = open_pipeline(world.folder)
            net = network_of(world, pipe)
            if world.family.lora_loader:
                assert hasattr(pipe, "load_lora_weights")
                world.family.load_lora(pipe, folder, file)
            else:
                assert not hasattr(pipe, "load_lora_weights")
                lora.load_lora_into(world.family.parts(net)[world.family.component], folder / file)
            shell = copy.copy(world.backbone)
            shell._modules = {"net": net}
            found = shell.raw(world.noise, t, world.cond)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert (found - base).abs().max() > 1e-3


def test_every_family_has_a_case():
    assert {c.family for c in CASES.values() if not c.family.startswith("declared")} == set(FAMILIES)


REAL = [(*p, 0.0)[:4] for c in CASES.values() for p in c.published]


@pytest.mark.parametrize("model,config,count,tolerance", REAL, ids=[r[0] for r in REAL])
def test_real_size(model, config, count, tolerance):
    """What a checkpoint of the real network stores, built on the meta device, against the published count;
    the relative tolerance is for the rounding of what was published.
    """
    with torch.device("meta"):
        net = getattr(diffusers, config["_class_name"]).from_config(config)
    assert isinstance(net, nn.Module)
    found = sum(v.numel() for v in net.state_dict().values())
    assert abs(found - count) <= tolerance * count, found
