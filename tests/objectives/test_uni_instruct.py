"""Uni-Instruct: exact gradients of every f on Gaussians, its corners, and which modes a divergence keeps."""

import numpy as np
import pytest
import torch

from fastgen.cli.train import main
from fastgen.diffusion import divergences
from fastgen.diffusion.divergences import TABLE
from fastgen.diffusion.schedules import EDM
from fastgen.objectives import requirements_of
from fastgen.objectives.uni_instruct import UniInstruct, UniInstructConfig
from tests.support import gaussians
from tests.support.heavier import first_of
from tests.support.modes import far_share, prefers_covering
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, at_x, gradient, softplus_pair
from tests.support.toys import run_mixture

SHORT = {"f": "kl", "gan_weight": 0.1}
"""settings of the contract battery"""

KNOWN = {  # d/d(m, s) of E_q h |Delta|^2 at t = 0.7, in score space
    "rkl": (-0.36034, -0.25431),
    "kl": (-0.47337, -0.57351),
    "jeffreys": (-0.83372, -0.82782),
    "js": (-0.19094, -0.17373),
    "chi2": (-1.76304, -3.13259),
    "neyman": (-0.70026, -0.21267),
    "hellinger": (-0.09951, -0.09433),
    "softened": (-0.16941, -0.08058),
}


def integrand(name):
    """E_q [ h(r) |Delta|^2 ], everything moving with (m, s)."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in gaussians.TEACHER)
    t = torch.tensor(gaussians.T, dtype=torch.float64)

    def value(x_t, m, s):
        log_r = gaussians.log_density(x_t, mean, std, t) - gaussians.log_density(x_t, m, s, t)
        gap = -(x_t - mean) / (std**2 + t**2) + (x_t - m) / (s**2 + t**2)
        return TABLE[name].h(log_r.exp()) * gap**2

    return value


def surrogate(name, mode="logit", detach_x0=False, power=1.0, terms=("sim", "fgm"), scale=1.0):
    """The gradient our loss gives with frozen score functions and ratio, back in score space."""

    def loss(x, x_t, t, real, fake, log_r):
        r = (power * log_r).exp()
        r = r if mode == "logit" else r.detach()
        h, k, r2h = divergences.weights(name, r, 1e-9, 1e9)
        clean = x.detach() if detach_x0 else x
        found = divergences.expanded(clean, real, fake, h * ("sim" in terms), k * ("fgm" in terms))
        if mode == "score":
            found = found + divergences.ratio_path(EDM(), x, x_t, t, real, fake, h, k, r2h)
        return found * scale

    return gaussians.surrogate(loss)[1] / gaussians.T**4


@pytest.mark.parametrize("name", TABLE)
def test_p1_gradient_of_the_expanded_divergence(name):
    """Both ways of differentiating the ratio hit the exact gradient; dropping it, or x0, does not."""
    wanted = gaussians.exact(integrand(name))
    torch.testing.assert_close(wanted, torch.tensor(KNOWN[name]).double(), rtol=0, atol=1e-5)
    for mode in ("logit", "score"):
        torch.testing.assert_close(surrogate(name, mode), wanted, rtol=0, atol=1e-5)
    off = (surrogate(name, detach_x0=True) - wanted).abs()
    assert off[1] > 0.01, "negative: x0 inside e carries gradient"
    if name != "rkl":
        for wrong in ({"mode": "none"}, {"power": -1.0}):
            assert (surrogate(name, **wrong) - wanted).abs().max() > 0.01, (name, wrong)


def test_p1_the_authors_script_takes_another_direction():
    """h Delta.e alone with a constant ratio: neither size nor direction of the exact gradient."""
    for name in ("js", "chi2", "kl"):
        found = surrogate(name, "none", terms=("sim",), scale=0.5)
        exact = gaussians.exact(integrand(name))
        assert 1 - torch.cosine_similarity(found, exact, 0) > 4e-3 and found.norm() < 0.6 * exact.norm(), name


def test_p1_reverse_kl_is_sid():
    """h = 1: twice SiD at alpha = 1/2; without the |Delta|^2 term twice alpha = 1 (SIM)."""
    for alpha, terms in ((0.5, ("sim", "fgm")), (1.0, ("sim",))):
        _, sid = gaussians.surrogate(
            lambda x, x_t, t, real, fake, log_r, a=alpha: divergences.score_identity(x, real, fake, a)
        )
        torch.testing.assert_close(surrogate("rkl", terms=terms), 2 * sid / gaussians.T**4)


EXPANDED = {  # D_f at t = 0 minus D_f at t = 6
    "rkl": 0.08819,
    "kl": 0.10851,
    "jeffreys": 0.19670,
    "js": 0.04705,
    "softened": 0.04115,
    "hellinger": 0.02402,
    "chi2": 0.32718,
    "neyman": 0.16081,
}


@pytest.mark.parametrize("name", TABLE)
def test_p1_expansion(name):
    """D_f at t = 0 minus D_f at t = 6 is the integral of t E_q h |Delta|^2; with the ratio upside down, or
    without D_f at t = 6, it is not.
    """
    (mp, sp), (m, s) = torch.tensor([gaussians.TEACHER, gaussians.STUDENT], dtype=torch.float64)
    u, w = gaussians.nodes()

    def at(t, value):
        x = m + (s**2 + t**2).sqrt() * u
        r = (gaussians.log_density(x, mp, sp, t) - gaussians.log_density(x, m, s, t)).exp()
        return (w * value(x, r)).sum()

    def integral(power):
        nodes, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(60))
        gap = lambda x, t: -(x - mp) / (sp**2 + t**2) + (x - m) / (s**2 + t**2)  # noqa: E731
        density = lambda t: t * at(t, lambda x, r: TABLE[name].h(r**power) * gap(x, t) ** 2)  # noqa: E731
        return (3 * weights * torch.stack([density(t) for t in 3 * (1 + nodes)])).sum()

    first, last = (at(torch.tensor(t).double(), lambda x, r: TABLE[name].f(r)) for t in (0.0, 6.0))
    torch.testing.assert_close(integral(1), first - last, rtol=1e-10, atol=0)
    assert float(first - last) == pytest.approx(EXPANDED[name], abs=5.1e-6)
    assert abs(float(first) - EXPANDED[name]) > 1e-5
    assert name == "rkl" or abs(integral(-1) - (first - last)) > 0.01 * EXPANDED[name]


def test_p1_static_gradients():
    """-E h Delta dx, f-distill's: the known values, all different from the expanded ones."""
    known = {
        "rkl": (-0.26846, -0.08828),
        "kl": (-0.30769, -0.18639),
        "js": (-0.13855, -0.06116),
        "chi2": (-0.84151, -0.82257),
    }
    for name, wanted in known.items():
        _, found = gaussians.surrogate(
            lambda x, x_t, t, real, fake, log_r, n=name: (
                TABLE[n].h(log_r.exp()).detach() * ((fake - real).detach() * x)[:, 0]
            )
        )
        torch.testing.assert_close(found / gaussians.T**2, torch.tensor(wanted).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("mode", ["logit", "score", "none"])
def test_p1_step_is_the_formula(mode, k):
    """JS at guidance 3 with the GAN, after a warm-up: the gradient in the sample, W and mean h held."""
    cfg = {"time": NEAR, "critic_time": FAR, "gan_weight": 0.3, "disc_weight": 0.2, "warmup_steps": 1}
    world = World(UniInstruct, f="js", ratio_grad=mode, **cfg)
    (critic, student), disc, S = world.turns(k), world.disc, world.schedule
    held, call = world.student.calls
    assert not held.grad and not torch.equal(held.x_t, call.x_t), "z' is drawn anew"
    x_t, t = world.shown(world.teacher)
    world.within(t, NEAR)
    eps, row = world.noise_in(x_t, t, call.out), lambda v: v[:, None]
    W = (call.out - world.guided(x_t, t)).abs().mean(1).detach()

    def loss(x):
        x_t = S.noise(x, eps, t)
        real, fake = world.guided(x_t, t), world.critic.backbone(x_t, t, world.batch.cond)
        logit, gap = disc.logit(x_t, t, world.batch.cond), real - fake
        r = logit.exp() if mode == "logit" else logit.exp().detach()
        h, kappa = (r / (1 + r), (r / (1 + r)) ** 2) if k else (torch.ones_like(r), torch.ones_like(r))
        found = 2 * h * (gap * (fake - x)).mean(1) + kappa * (gap**2).mean(1)
        if mode == "score":
            r2h = -2 * r**2 / (1 + r) ** 3 if k else 0 * r
            way = 2 * (h - kappa) * (gap * (fake - x)).sum(1) - r2h * (gap**2).sum(1)
            found = found + ((row(way * (1 - t) / t**2) * gap).detach() * x_t).mean(1)
        return (found / h.mean().detach() / W + 0.3 * torch.nn.functional.softplus(-logit) / W).mean()

    torch.testing.assert_close(gradient(student.loss, call.out), at_x(loss, call.out), rtol=1e-4, atol=1e-6)
    fake, real = (disc.logit(*seen) for seen in disc.seen[:2])
    call = world.critic.calls[0]
    world.within(call.t, FAR)
    world.noise_in(call.x_t, call.t, held.out)
    denoising = (row(world.native(call.t)) * (call.out - held.out) ** 2).mean()
    torch.testing.assert_close(critic.loss, denoising + 0.2 * softplus_pair(fake, real))


def test_needs_data_only_with_a_ratio():
    assert requirements_of(UniInstructConfig()).real_data
    assert not requirements_of(UniInstructConfig(f="rkl", gan_weight=0)).real_data


BAD = {
    "unknown f": (["--objective.f", "wasserstein"], ("objective.f", "hellinger", "neyman")),
    "no ratio": (["--objective.gan_weight", "0"], ("gan_weight", "js")),
    "no data": (["--data.name", ""], ("data: no images", "uni_instruct")),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case, capsys, tmp_path):
    argv, named = BAD[case]
    (tmp_path / "run.yaml").write_text(
        "{teacher: {path: 'analytic:gmm2d-edm'}, objective: {name: uni_instruct}, data: {name: digits}}"
    )
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run"), *argv]) == 2
    message = capsys.readouterr().err
    assert all(n in message for n in named) and len(message.strip().splitlines()) == 1, message
    assert not (tmp_path / "run").exists()


def test_p1_what_the_divergences_themselves_prefer():
    """One Gaussian for two modes: without noise JS ranks a single mode first, as reverse KL does; forward KL
    and Jeffreys rank covering first. With noise of 0.57, where the modes begin to touch, all of them do.
    """
    for name, covers in (("rkl", False), ("js", False), ("kl", True), ("jeffreys", True)):
        assert prefers_covering(name, 0.0) == covers and prefers_covering(name, 0.57), name


def test_p2_which_modes_a_divergence_keeps():
    """Two modes, a student with room for one: reverse KL drops the far one, Jeffreys and forward KL do not.

    JS drops it too, as D_f without noise does (test above): between two noise levels the expanded form is D_f
    at the lower minus D_f at the higher, while f-distill adds D_f at all of them, and the noisy ones cover.
    """
    share = {name: far_share(name, expanded=True) for name in ("rkl", "js", "kl", "jeffreys")}
    assert share["rkl"] < 0.01 and share["js"] < 0.01, share
    assert abs(share["kl"] - 0.5) < 0.05 and share["jeffreys"] > 0.1, share


@pytest.mark.parametrize("f", first_of(["js", "kl"]))
def test_p2_distils_the_mixture(tmp_path, f):
    objective = {"name": "uni_instruct", "f": f, "disc_weight": 0.3, "gan_weight": 0.003, "warmup_steps": 50}
    before, after, *_ = run_mixture(tmp_path, objective, steps=250)
    assert after < 0.02 and after < before / 4, (before, after)


def test_p4_uni_instruct(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "uni_instruct", "gan_weight": 0.1})
