"""The density ratio of f_distill and uni_instruct is that of the very x_t whose score it weighs.

Exact players on Gaussians: teacher N(0.5, 1), student N(0.1, 0.9^2), the score at noise 0.7.
"""

import math

import pytest
import torch

from fastgen.cli.train import main
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import EDM
from fastgen.objectives import REGISTRY
from fastgen.objectives.base import TimeConfig
from tests.support import gaussians
from tests.support.toys import AffineStudent, batch_of, gaussian_role, rng


def at(level):
    """Settings that draw one noise level."""
    return {"kind": "log_normal", "mean": math.log(level), "std": 1e-6}


class ExactDiscriminator(torch.nn.Module):
    """log p_t / q_t of the two Gaussians, and the critic's D beside it."""

    def __init__(self, critic):
        super().__init__()
        self.role = critic

    def forward(self, x_t, t, cond, score=False):
        p, q = (torch.tensor(v, dtype=torch.float64) for v in (gaussians.TEACHER, gaussians.STUDENT))
        sigma = t[:, None]
        log_r = gaussians.log_density(x_t, *p, sigma) - gaussians.log_density(x_t, *q, sigma)
        logits = [log_r[:, 0]]
        return (logits, self.role(x_t, t, cond)) if score else logits


def gradient(name, monkeypatch, gan_time=None, num=200_000):
    """d loss / d(m, s) [2] under forward KL, without the GAN term and the normaliser |x - D_real|; with
    `gan_time` in settings that were not checked.
    """
    monkeypatch.setattr(losses, "per_sample_mean", lambda v: torch.ones_like(v[:, 0]))
    S, cls = EDM(), REGISTRY[name]
    common = {"f": "kl", "student_every": 1, "time": at(gaussians.T), "gan_weight": 1e-12}
    cfg = cls.config(**common, **({"bins": 0} if name == "f_distill" else {}))
    cfg = cfg.model_copy(update={"gan_time": gan_time and TimeConfig(**gan_time)})
    student, critic = AffineStudent(S, *gaussians.STUDENT), gaussian_role(S, *gaussians.STUDENT)
    parts = {"student": student, "critic": critic, "teacher": gaussian_role(S, *gaussians.TEACHER)}
    objective = cls(cfg, {**parts, "disc": ExactDiscriminator(critic)}, rng())
    objective.prepare()
    objective.critic_error = lambda *args: {}  # a diagnostic, quadratic in the batch
    torch.manual_seed(0)
    for loss, _ in objective.step(batch_of(torch.randn(num, 1, dtype=torch.float64)), 0):
        if objective.active == "student":
            net = student.backbone
            return torch.stack(torch.autograd.grad(loss, (net.m, net.s)))
    raise AssertionError("no turn of the student")


KNOWN = {  # of arXiv 2502.15681, in D-space: sigma^2 times; and of the expanded form, sigma^4 times
    "f_distill": gaussians.T**2 * torch.tensor([-0.30769, -0.18639], dtype=torch.float64),
    "uni_instruct": gaussians.T**4 * torch.tensor([-0.47337, -0.57351], dtype=torch.float64),
}


@pytest.mark.parametrize("name", KNOWN)
def test_p1_exact_players_give_the_exact_gradient(name, monkeypatch):
    """And with the ratio read at noise 3 they do not: the reason why such settings are refused."""
    torch.testing.assert_close(gradient(name, monkeypatch), KNOWN[name], rtol=0.02, atol=0)
    off = gradient(name, monkeypatch, gan_time=at(3.0)) / KNOWN[name] - 1
    assert off.abs().max() > 0.15, off


def settings(host, **cfg):
    """Checked settings of a method, by itself or inside another one."""
    return REGISTRY[host].config(host=cfg) if host else REGISTRY[cfg["name"]].config(**cfg)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("host", ["", "disback", "msd"])
def test_levels_of_their_own_are_refused(name, host):
    """In one line, also inside the methods that wrap a host; reverse KL reads no ratio and keeps them."""
    with pytest.raises(ValueError, match="gan_time: f: kl weighs the score by the discriminator's ratio"):
        settings(host, name=name, f="kl", gan_time={"low": 0.1})
    settings(host, name=name, f="rkl", gan_time={"low": 0.1})
    settings(host, name=name, f="kl")


def test_the_mistake_is_one_line(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "{teacher: {path: 'analytic:gmm2d-edm'}, data: {name: digits},"
        " objective: {name: disback, host: {name: f_distill, gan_time: {low: 0.1}}}}"
    )
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert "objective.host" in said and "leave gan_time out" in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "run").exists()
