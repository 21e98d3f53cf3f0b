"""f-distill: reverse KL is DMD2, the weight's mean and direction, and the modes that a divergence keeps."""

import pytest
import torch

from fastgen.cli.train import main
from fastgen.diffusion import divergences, losses
from fastgen.diffusion.schedules import EDM, Flow
from fastgen.objectives import REGISTRY, requirements_of
from fastgen.objectives.f_distill import FDistill, FDistillConfig
from fastgen.roles.heads import Discriminator
from fastgen.roles.roles import Role
from tests.support.modes import far_share
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, at_x, dmd_weight, gradient, softplus_pair
from tests.support.toys import batch_of, rng, run_mixture

SHORT = {"student_every": 2, "f": "kl", "gan_weight": 0.1, "disc_weight": 0.1}
"""settings of the contract battery"""


def make(name="f_distill", schedule=None, **cfg):
    """An objective over small MLPs on points [B, 2]."""
    from fastgen.networks.analytic import MLPDenoiser
    from fastgen.roles.roles import Student, StudentSpec

    schedule = schedule or Flow()
    torch.manual_seed(0)
    nets = {n: MLPDenoiser(2, schedule, width=16) for n in ("student", "critic", "teacher")}
    parts = {n: Role(net) for n, net in nets.items()}
    parts["student"] = Student(nets["student"], None, StudentSpec(schedule.steps(1)))
    parts["disc"] = Discriminator(parts["critic"], (-1,), (torch.zeros(2, 2), torch.ones(2).double(), {}))
    cls = REGISTRY[name]
    objective = cls(
        cls.config(**{"student_every": 1, "gan_weight": 0.1, "disc_weight": 0.1, **cfg}), parts, rng()
    )
    objective.prepare()
    return objective


def gradients(objective, k=0):
    loss, _ = next(
        objective.step(
            batch_of(
                torch.randn(32, 2, generator=torch.Generator().manual_seed(3)),
                torch.randn(32, 2, generator=torch.Generator().manual_seed(4)),
            ),
            k,
        )
    )
    return torch.autograd.grad(loss, list(objective.players["student"].trainable().values()))


def test_p1_reverse_kl_is_dmd2_bit_for_bit():
    found, wanted = gradients(make(f="rkl")), gradients(make("dmd2"))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    other = gradients(make(f="kl"))
    assert not all(torch.equal(a, b) for a, b in zip(other, wanted))


def test_p1_step_is_the_formula():
    """DMD2's gradient times r / mean r at guidance 3, and the GAN; the critic's turn is DMD2's."""
    cfg = {"time": NEAR, "critic_time": FAR, "gan_weight": 0.3, "disc_weight": 0.2, "r1_weight": 0.7}
    world = World(FDistill, f="kl", bins=0, student_every=1, **cfg)
    (student, critic), disc = world.turns(), world.disc
    x, (x_t, t) = world.student.calls[0].out, world.shown(world.teacher)
    eps, cond = world.noise_in(x_t, t, x), world.batch.cond
    r = disc.logit(x_t, t, cond).exp()
    h = (r / r.mean())[:, None].detach()

    gan = world.gan_of(0.3, eps, t)
    wanted = world.score_gradient(x, lambda *at: h * dmd_weight(*at)) + at_x(gan, x)
    torch.testing.assert_close(gradient(student.loss, x), wanted)
    fake, real = (disc.logit(*seen) for seen in disc.seen[1:])
    assert torch.equal(disc.seen[1][1], disc.seen[2][1])
    pair = 0.2 * softplus_pair(fake, real) + 0.7 * disc.a.square().sum()
    torch.testing.assert_close(world.check_critic(critic, x), pair.detach())


def logits_of(r):
    return [torch.as_tensor(r).log()]


def test_p1_equal_ratios_make_all_divergences_equal():
    t = torch.full((4,), 0.5).double()
    for name in divergences.TABLE:
        h, _ = make(f=name).weight(logits_of([3.0] * 4), t)
        torch.testing.assert_close(h, torch.ones(4))


def test_p1_weights_and_their_direction():
    """r = 2 against 0.5 within one bin: kl 4 to 1, neyman 1 to 4; the mean of h is 1."""
    t = torch.full((2,), 0.5).double()
    for name, wanted in (("kl", 4.0), ("neyman", 0.25), ("js", 2.0), ("rkl", 1.0), ("hellinger", 2.0)):
        objective = make(f=name, bins=0)
        h, _ = objective.weight(logits_of([2.0, 0.5]), t)
        torch.testing.assert_close(h[0] / h[1], torch.tensor(wanted), rtol=1e-4, atol=0)
        torch.testing.assert_close(h.mean(), torch.tensor(1.0))


def test_p1_the_ratio_is_clamped_and_binned():
    """exp(+-50) becomes 20 and 0.1; each noise level is divided by its own mean, which is remembered."""
    objective = make(f="kl", bins=0)
    h, _ = objective.weight([torch.tensor([50.0, -50.0])], torch.full((2,), 0.5).double())
    torch.testing.assert_close(h[0] / h[1], torch.tensor(200.0))
    t = torch.tensor([0.15, 0.15, 0.95, 0.95]).double()
    h, _ = make(f="kl", bins=10).weight(logits_of([1.0, 3.0, 4.0, 12.0]), t)
    torch.testing.assert_close(h[:2], h[2:], rtol=1e-4, atol=1e-5)  # 1 : 3 at both levels
    objective = make(f="kl", bins=10, ratio_memory=8)
    for logits in (logits_of([1.0, 3.0, 4.0, 12.0]), logits_of([1.0, 1.0, 4.0, 4.0])):
        objective.weight(logits, t)
    sums, counts = objective.state()["ratio_sums"]
    torch.testing.assert_close(sums[[1, 9, 5]] / 3, torch.tensor([4.0 / 3, 16.0 / 3, 0.0]))
    torch.testing.assert_close(counts[[1, 9, 5]], torch.tensor([3.0, 3.0, 0.0]))
    where = make(f="kl", schedule=EDM())
    where.weight(logits_of([2.0, 2.0]), torch.tensor([0.01, 80.0]).double())
    assert where.state()["ratio_sums"][1].nonzero().flatten().tolist() == [0, 9]


def spread_of_h(batch, steps, f="kl", **cfg):
    """Spread of h once the means are known, for ratios whose size and spread depend on the noise level."""
    objective, generator, seen = make(f=f, **cfg), torch.Generator().manual_seed(1), []
    for k in range(steps):
        t, z = (draw(batch, generator=generator) for draw in (torch.rand, torch.randn))
        h, _ = objective.weight([0.5 * t + (1 - t) * z], t.double())
        if k >= steps // 2:
            seen.append(h)
    return float(torch.cat(seen).std())


def test_p1_small_batches_weigh_as_a_large_one_does():
    """Batches of 24 to 64 have the spread of h that batches of 2,048 have; their own means take it away."""
    for f in ("kl", "js"):
        large = spread_of_h(2048, 20, f)
        for batch in (24, 64):
            assert spread_of_h(batch, 24_000 // batch, f) == pytest.approx(large, rel=0.08), (f, batch)
            alone = spread_of_h(batch, 24_000 // batch, f, ratio_memory=batch)
            assert alone < 0.95 * large and (f != "kl" or alone < 0.82 * large), (f, batch, alone, large)


def test_p1_no_gradient_through_the_weight():
    """h is a constant: the discriminator's part of the student's gradient is that of the GAN term alone."""
    objective = make(f="chi2")
    logits = [torch.zeros(4, requires_grad=True)]
    h, _ = objective.weight(logits, torch.full((4,), 0.5).double())
    assert not h.requires_grad
    x = torch.randn(4, 2, requires_grad=True)
    losses.distribution_matching(x, torch.zeros(4, 2), torch.ones(4, 2), h).backward()
    assert logits[0].grad is None and x.grad is not None


BAD = {
    "unknown f": (["--objective.f", "tv"], ("objective.f", "rkl", "neyman")),
    "no GAN": (["--objective.gan_weight", "0"], ("objective.gan_weight", "greater than 0")),
    "no data": (["--data.name", ""], ("data: no images", "f_distill")),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case, capsys, tmp_path):
    argv, named = BAD[case]
    (tmp_path / "run.yaml").write_text(
        "{teacher: {path: 'analytic:gmm2d-edm'}, objective: {name: f_distill}, data: {name: digits}}"
    )
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run"), *argv]) == 2
    message = capsys.readouterr().err
    assert all(n in message for n in named) and len(message.strip().splitlines()) == 1, message
    assert not (tmp_path / "run").exists() and requirements_of(FDistillConfig()).real_data


def test_p2_distils_the_mixture(tmp_path):
    objective = {"name": "f_distill", "student_every": 2, "gan_weight": 0.03, "disc_weight": 0.3}
    before, after, *_ = run_mixture(tmp_path, objective, steps=300)
    assert after < 0.02 and after < before / 4, (before, after)


def test_p4_f_distill(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "f_distill", "student_every": 1, "gan_weight": 0.1})


def test_p2_which_modes_a_divergence_keeps():
    """Two modes, a student with room for one: reverse KL drops the far one, JS and forward KL cover it."""
    share = {name: far_share(name, expanded=False) for name in ("rkl", "js", "kl", "neyman")}
    assert share["rkl"] < 0.01 and share["js"] > 0.1 and abs(share["kl"] - 0.5) < 0.05, share
    assert share["neyman"] < 0.01, ("negative: the ratio upside down seeks the mode", share)
