"""SwiftBrush: its weight, guidance on both scores, the critic's optimum, version 2's CLIP loss and fusion."""

import pytest
import torch
import yaml

from fastgen.cli.train import main
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import VP, Flow, expand
from fastgen.objectives.swiftbrush import SwiftBrush, SwiftBrushConfig
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, gradient
from tests.support.toys import (
    AffineStudent,
    CountingRole,
    GaussianNet,
    batch_of,
    gaussian_role,
    rng,
    run_mixture,
)

SHORT = {"student_every": 1}
"""settings of the contract battery"""


def parts(S, m=-1.0, s=0.3):
    student, critic = AffineStudent(S, m, s), CountingRole(GaussianNet(S, m, s))
    return {"student": student, "critic": critic, "teacher": gaussian_role(S, 0.5, 1.0)}


def test_p1_weight_is_sigma_squared_on_eps():
    """alpha sigma (D_L - D_T) equals sigma^2 (e_T - e_L) at every time."""
    S = VP.scaled_linear()
    t = torch.tensor([20.0, 300.0, 980.0], dtype=torch.float64)
    x_t, real, fake = torch.randn(3, 3, 4, dtype=torch.float64)
    e_T, e_L = (S.from_x0("eps", D, x_t, t) for D in (real, fake))
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(losses.score_difference(x, real, fake, S.alpha(t) * S.sigma(t)), x)
    torch.testing.assert_close(grad * x.numel(), S.sigma(t)[:, None] ** 2 * (e_T - e_L))


def test_p1_guidance_is_linear_in_both_branches():
    """Same w in both: g^w = (1 - w) g_null + w g_cond; w = 1 is the conditional gradient."""
    S = Flow()
    x_t, t = torch.randn(6, 2, dtype=torch.float64), torch.full((6,), 0.6, dtype=torch.float64)
    nets = {n: gaussian_role(S, *v) for n, v in {"T": (0.5, 1.0), "L": (-0.2, 0.7)}.items()}

    class Recorder(CountingRole):
        def __call__(self, x_t, t, cond):
            return super().__call__(x_t, t, cond) + cond["shift"][:, None] * self.backbone.s

    recorders = {n: Recorder(r.backbone) for n, r in nets.items()}
    cond, null = ({"shift": torch.full((6,), v, dtype=torch.float64)} for v in (1.0, 0.0))

    def g(w, c=cond):
        return recorders["L"].guided(x_t, t, c, null, w) - recorders["T"].guided(x_t, t, c, null, w)

    torch.testing.assert_close(g(4.5), -3.5 * g(1.0, null) + 4.5 * g(1.0))
    torch.testing.assert_close(g(torch.full((6,), 4.5)), g(4.5))


class Prompted(GaussianNet):
    """Exact denoiser of N(m + shift, s^2), shift being the condition: equal spreads make guidance exact."""

    scale = 1.0

    def forward(self, x_t, t, cond):
        shift = self.scale * cond["shift"][:, None]
        return super().forward(x_t - expand(self.schedule.alpha(t), x_t) * shift, t, {}) + shift

    raw = forward


@pytest.mark.parametrize("plain,rest", [(False, 1.0), (True, 3.0)])
def test_p1_where_the_step_vanishes(plain, rest):
    """Teacher N(0.5 + 1, 1), null N(0.5, 1), w = 3: guided alike, a critic that equals the unguided teacher
    feels nothing; left plain, one that equals the guided teacher, N(0.5 + 3, 1), does; never the other way.
    """
    S = VP.scaled_linear()
    cfg = SwiftBrushConfig(plain_critic=plain)
    for shift in (1.0, 3.0):
        players = parts(S)
        players["teacher"], players["critic"] = (CountingRole(Prompted(S, 0.5, 1.0)) for _ in range(2))
        players["critic"].backbone.scale = shift  # at 3 its conditional is the guided teacher's
        objective = SwiftBrush(cfg, players, rng())
        objective.guidance = 3.0
        one, null = ({"shift": torch.full((8,), v, dtype=torch.float64)} for v in (1.0, 0.0))
        batch = batch_of(torch.zeros(8, 1), torch.randn(8, 1, dtype=torch.float64), one)
        batch.uncond = null
        _, logs = next(objective.step(batch, 0))
        assert (float(logs["real_fake_gap"]) < 1e-9) == (shift == rest), (shift, logs)


@pytest.mark.parametrize("plain", [False, True])
def test_p1_step_is_the_formula(plain):
    """alpha sigma (D_L - D_T), both at guidance 3 or the critic plain; the critic under alpha^2."""
    world = World(SwiftBrush, VP.scaled_linear(), time=NEAR, critic_time=FAR, plain_critic=plain)
    student, critic = world.turns()
    x, S = world.student.calls[0].out, world.schedule
    x_t, t = world.shown(world.teacher)
    world.within(t, NEAR)
    world.noise_in(x_t, t, x)
    fake = world.guided(x_t, t, 1.0 if plain else 3.0, world.critic)
    weight = (S.alpha(t) * S.sigma(t))[:, None]
    wanted = (weight * (fake - world.guided(x_t, t)) / x.numel()).detach()
    torch.testing.assert_close(gradient(student.loss, x), wanted, rtol=1e-4, atol=1e-7)
    assert abs(world.check_critic(critic, x, lambda t: S.alpha(t) ** 2)) < 1e-12


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_p1_step_drops_the_condition_where_guidance_is_used(guidance, monkeypatch):
    """c' is null with probability critic_drop, and never without guidance."""
    world = World(SwiftBrush)
    world.objective.guidance, shares = guidance, []
    monkeypatch.setattr(
        world.objective, "drop_batch_condition", lambda batch, share: shares.append(share) or batch.uncond
    )
    world.turns()
    assert shares == [0.1 if guidance != 1 else 0]
    assert world.critic.calls[-1].cond is world.batch.uncond


def descend(follow, steps=400, lr=0.05):
    S = VP.scaled_linear()
    players = parts(S)
    objective = SwiftBrush(SwiftBrushConfig(), players, rng())
    student, critic = players["student"], players["critic"]
    optimizer = torch.optim.Adam(student.trainable().values(), lr)
    for k in range(steps):
        with torch.no_grad():
            follow(critic, student.backbone)
        objective.rng.reset(k)
        noise = torch.randn(512, 1, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        loss, _ = next(objective.step(batch_of(noise, noise), k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - k / steps)
    return student.backbone.m.item(), student.backbone.s.item()


def exact(critic, student):
    critic.backbone.m.copy_(student.m)
    critic.backbone.s.copy_(student.s)


def test_p1_converges_with_an_exact_critic():
    m, s = descend(exact)
    assert abs(m - 0.5) < 0.1 and abs(s - 1.0) < 0.1, (m, s)


def test_p1_negative_without_critic_collapses_to_the_mode():
    """e_L := the true eps is score distillation sampling: the mean is right and the spread is gone."""
    S, teacher = VP.scaled_linear(), gaussian_role(VP.scaled_linear(), 0.5, 1.0)
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-1.0, 0.3))
    optimizer, generator = torch.optim.Adam([m, s], 0.05), torch.Generator().manual_seed(0)
    for _ in range(400):
        z, eps = torch.randn(2, 512, 1, generator=generator, dtype=torch.float64)
        t = S.from_unit(0.02 + 0.96 * torch.rand(512, generator=generator, dtype=torch.float64))
        x = m + s * z
        real = teacher(S.noise(x.detach(), eps, t), t, {})
        optimizer.zero_grad()
        losses.score_difference(x, real, x.detach(), S.alpha(t) * S.sigma(t)).backward()
        optimizer.step()
    assert abs(m - 0.5) < 0.15 and abs(s) < 0.25, (m, s)


def test_p1_critic_weight_does_not_move_the_optimum():
    """Under alpha^2 times the native weight the critic still ends at the student's own distribution."""
    S = VP.scaled_linear()
    players = parts(S, 0.4, 0.6)
    with torch.no_grad():
        players["critic"].backbone.m.fill_(-0.5)
        players["critic"].backbone.s.fill_(1.2)
    cfg = SwiftBrushConfig(critic_time={"low": 0.1, "high": 0.95}, student_every=1000)
    objective = SwiftBrush(cfg, players, rng())
    optimizer = torch.optim.Adam(players["critic"].trainable().values(), 0.05)
    for k in range(250):
        objective.rng.reset(k)
        noise = torch.randn(512, 1, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        loss, _ = next(objective.step(batch_of(noise, noise), k + 1))  # the critic's turn alone
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - k / 250)
    net = players["critic"].backbone
    assert abs(net.m - 0.4) < 0.05 and abs(abs(net.s) - 0.6) < 0.05, (net.m, net.s)


@pytest.mark.parametrize("family", ["sd", "sana"])
def test_p1_fresh_adapter_gives_exactly_nothing(tiny, family):
    """LoRA B = 0: critic and teacher are one, so the student's first gradient is zero; later it is not."""
    from tests.objectives.test_contract import batch, make, play

    _, cast, objective = make("swiftbrush", tiny(family), "lora")
    one = batch(cast)
    loss, logs = next(objective.step(one, 0))
    assert loss.item() == 0 and float(logs["real_fake_gap"]) == 0
    for k in range(2):
        objective.rng.reset(k)
        play(objective, one, k)
    loss, logs = next(objective.step(one, 2))
    assert float(logs["real_fake_gap"]) > 0


def test_p1_clamped_cosine_stops_at_the_margin():
    cos = torch.tensor([0.2, 0.36, 0.9], requires_grad=True)
    losses.clamped(cos, 0.35).backward()
    assert cos.grad.tolist() == pytest.approx([-1 / 3, 0.0, 0.0])


def test_p1_step_draws_the_samples_to_their_words():
    """The image-text term reaches x: its gradient is -weight / numel where the cosine is below tau."""
    cfg = {"clip_weight": 0.1, "clip_steps": 10, "clip_margin": 1.0}
    found = []
    for more in (cfg, {}):
        world = World(SwiftBrush, parts={"clip": Fixed()}, **more)
        world.batch.texts = ["a"] * 8
        found.append(gradient(world.turns(5)[0].loss, world.student.calls[0].out))
    below = (world.student.calls[0].out.mean(1) < 1).double()[:, None].expand(-1, 3)
    torch.testing.assert_close(found[0] - found[1], -0.05 * below / 24)


class Fixed:
    """An image-text net whose cosine is the mean pixel."""

    def __call__(self, x0, texts):
        assert texts == ["a"] * len(x0)
        return x0.flatten(1).mean(1)

    def trainable(self):
        return {}


def test_p1_clip_weight_falls_to_nothing():
    S = VP.scaled_linear()
    cfg = SwiftBrushConfig(clip_weight=0.1, clip_steps=10, clip_margin=0.35)
    found = {}
    for k in (0, 5, 10, 12):
        objective = SwiftBrush(cfg, {**parts(S), "clip": Fixed()}, rng())
        batch = batch_of(torch.zeros(8, 1), torch.randn(8, 1, dtype=torch.float64))
        batch.texts = ["a"] * 8
        loss, logs = next(objective.step(batch, k))
        found[k] = float((loss.detach() - logs["vsd"].detach()) / logs["clip"].detach())
    assert found == pytest.approx({0: 0.1, 5: 0.05, 10: 0.0, 12: 0.0}, abs=1e-9)
    with pytest.raises(ValueError, match="clip_steps"):
        SwiftBrushConfig(clip_weight=0.1)


def test_null_prompts_only_where_guidance_is_used():
    S = VP.scaled_linear()
    batch = batch_of(torch.zeros(4, 1), torch.randn(4, 1, dtype=torch.float64), {"c": torch.ones(4)})
    batch.uncond = {"c": torch.zeros(4)}
    objective = SwiftBrush(SwiftBrushConfig(), parts(S), rng())
    kept = [objective.drop_batch_condition(batch, 0.3) is batch.cond for _ in range(400)]
    assert 0.62 < sum(kept) / 400 < 0.78
    assert objective.drop_batch_condition(batch, 0) is batch.cond


def text_run(tiny, tmp_path, name, student, objective):
    (tmp_path / "prompts.txt").write_text("a red dress\na blue bag\n")
    values = {
        "teacher": {"path": str(tiny("sd")), "guidance": 2.0},
        "student": student,
        "critic": {"kind": "lora", "lora": {"rank": 2}},
        "data": {"name": "", "prompts": str(tmp_path / "prompts.txt")},
        "objective": {"name": "swiftbrush", **objective},
        "optim": {"student": {"lr": 1e-2}, "critic": {"lr": 1e-2}},
        "train": {"max_train_steps": 3, "train_batch_size": 2, "validation_steps": 0, "ema_decay": [0.5]},
        "eval": {"num_samples": 0},
    }
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    flags = ["--config", str(tmp_path / f"{name}.yaml"), "--output_dir", str(tmp_path / name)]
    return main(flags), tmp_path / name / "export"


def test_p1_version_2_fuses_a_full_and_a_lora_student(tiny, tmp_path):
    """The CLIP-trained LoRA merged, then averaged: weight 1 is A, weight 0 is B, one half the middle."""
    from fastgen.export.load import fuse, load_export

    clip = {"clip_weight": 0.1, "clip_steps": 3, "clip_margin": 0.9}
    code, lora = text_run(tiny, tmp_path, "b", {"kind": "lora", "lora": {"rank": 2}}, clip)
    assert code == 0
    code, full = text_run(tiny, tmp_path, "a", {"kind": "full"}, {})
    assert code == 0
    code, fused = text_run(tiny, tmp_path, "c", {"kind": "full", "fuse": str(lora), "fuse_weight": 0.5}, {})
    assert code == 0

    def weights(folder):
        return {f"net.{n}": p.clone() for n, p in load_export(folder).role.backbone.net.state_dict().items()}

    a, own = weights(full), weights(full)
    fuse(own, str(lora), 1.0)
    assert all(torch.equal(own[n], a[n]) for n in a)
    fuse(own, str(lora), 0.0)
    b = own
    assert any(not torch.equal(a[n], b[n]) for n in a)
    for n, value in weights(fused).items():  # the same seed: run c is run a until its end
        torch.testing.assert_close(value, 0.5 * (a[n] + b[n]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "student,message",
    [
        ({"kind": "lora", "lora": {"rank": 2}, "fuse": "x"}, "student.fuse"),
        ({"kind": "full", "fuse": "/nowhere/at/all"}, "student.fuse"),
        ({"kind": "full", "fuse_weight": 0.3}, "student.fuse_weight"),
    ],
)
def test_a_fusion_that_cannot_be_is_refused_at_once(tiny, tmp_path, capsys, student, message):
    code, export = text_run(tiny, tmp_path, "bad", student, {})
    assert code == 2 and message in capsys.readouterr().err and not export.parent.exists()


@pytest.mark.slow
def test_p2_distils_the_mixture(tmp_path):
    objective = {"name": "swiftbrush", "student_every": 2}
    before, after, *_ = run_mixture(tmp_path, objective, "analytic:gmm2d-vp", steps=300)
    assert after < 0.04 and after < before / 3, (before, after)


def test_p4_swiftbrush(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "swiftbrush"})
