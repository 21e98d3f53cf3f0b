"""HiPA: the two parts of its loss written out, an exact teacher reached at every frequency, its size."""

import pytest
import torch
from torch import nn

from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.paths import config
from fastgen.diffusion.schedules import Flow
from fastgen.diffusion.spectra import high_pass
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.hipa import HiPA, HiPAConfig
from fastgen.roles.roles import Student, StudentSpec
from fastgen.training.assembly import make_weightless_cast
from tests.support.replay import replay
from tests.support.toys import batch_of, fit, gaussian_role, rng

SHORT = {"teacher_steps": 2}
"""settings of the contract battery"""
SHAPE = (1, 8, 8)


class Pictures(nn.Module):
    """x0 is its own picture."""

    shape = SHAPE

    def forward(self, x0):
        return x0


class Bands(Denoiser):
    """x = mean + low z_low + high z_high: one number for the low and one for the high frequencies of z."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.mean, self.low, self.high = (nn.Parameter(torch.tensor(v)) for v in (0.0, 1.0, 1.0))

    def forward(self, x_t, t, cond):
        fine = high_pass(x_t, 0.5)
        return self.mean + self.low * (x_t - fine) + self.high * fine

    raw = forward


def make(**cfg):
    """HiPA of a two-band student of the exact N(0.5, 0.3^2)."""
    S = Flow()
    student = Student(Bands(S), None, StudentSpec(S.steps(1)))
    parts = {"student": student, "teacher": gaussian_role(S, 0.5, 0.3), "images": Pictures()}
    objective = HiPA(HiPAConfig(teacher_steps=30, **cfg), parts, rng())
    objective.prepare()
    return objective


def pictures(num, first=0):
    batch = batch_of(torch.zeros(num, *SHAPE))
    batch.index = torch.arange(first, first + num)
    return batch


def test_p1_step_is_the_formula():
    """Pixels, frequencies by explicit transform matrices, and edges by explicit differences."""
    objective = make(high_weight=0.7, edge_weight=0.4, cutoff=0.5)
    loss, logs = next(objective.step(pictures(6), 0))
    z, y = (torch.stack([objective.pairs.rows[i][j] for i in range(6)]) for j in (0, 1))
    d = (z - y).double()  # the student starts as the identity
    k = torch.arange(8)
    F = torch.exp(-2j * torch.pi * k[:, None] * k / 8) / 8**0.5
    signed = torch.where(k < 4, k, k - 8).abs()
    kept = torch.maximum(signed[:, None], signed) > 2
    spectrum = F @ d.to(F.dtype) @ F.T
    fine = (F.conj() @ (spectrum * kept) @ F.conj().T).real
    pad = lambda x: torch.cat([x[..., 1:2], x, x[..., -2:-1]], -1)  # noqa: E731  (reflected)

    def edges(x):
        x = pad(pad(x).transpose(-1, -2)).transpose(-1, -2)
        across = x[..., 2:] - x[..., :-2]
        across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
        down = x[..., 2:, :] - x[..., :-2, :]
        down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
        return (across**2 + down**2 + 1e-6).sqrt()

    high = fine.abs().mean() + 0.4 * (edges(z) - edges(y)).abs().mean()
    assert float(logs["spatial"]) == pytest.approx(float(d.abs().mean()), rel=1e-5)
    assert float(logs["high"]) == pytest.approx(float(high), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(float(d.abs().mean() + 0.7 * high), rel=1e-4)


def test_p1_low_frequencies_do_not_count_as_high_ones():
    objective = make(edge_weight=0.0, cutoff=0.5)
    image = torch.rand(2, *SHAPE)
    wave = torch.sin(2 * torch.pi * torch.arange(8) / 8).expand(2, *SHAPE)
    assert float(objective.high(image + 0.3 + wave, image)) < 1e-6
    grain = torch.tensor([1.0, -1.0]).repeat(4).expand(2, *SHAPE)
    assert float(objective.high(image + 0.3 * grain, image)) > 0.2


def test_p1_without_its_weight_it_is_regression_on_pictures():
    plain, both = make(high_weight=0.0), make()
    loss, logs = next(plain.step(pictures(4), 0))
    assert torch.equal(loss.detach(), logs["spatial"])
    assert float(next(both.step(pictures(4), 0))[0].detach()) > float(loss.detach())


def test_p2_reaches_the_exact_teachers_map_at_every_frequency():
    """The ODE of N(m, s^2) is x = m + s z; negative: targets of other noise leave no high frequencies."""
    gains = {}
    for paired in (True, False):
        objective = make(high_weight=1.0, edge_weight=0.0)
        if not paired:
            solved = objective.pairs.make
            objective.pairs.make = lambda *a, f=solved: torch.stack([f(*a)[:, 0], f(*a)[:, 1].roll(1, 0)], 1)
        fit(objective, lambda r: pictures(48), 120)
        net = objective.student.backbone
        gains[paired] = [float(p.detach()) for p in (net.mean, net.low, net.high)]
    assert gains[True] == pytest.approx([0.5, 0.3, 0.3], abs=0.02), gains
    assert abs(gains[False][2]) < 0.06, gains


def test_p4_hipa(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "hipa"})


@pytest.mark.slow
def test_the_published_adapter_has_the_published_size():
    """Rank 16 on the attention of Stable Diffusion: 3.2 (1.5) million parameters, 0.4 % of the network."""
    files = [str(config(f"{kind}.yaml")) for kind in ("teachers/sd15", "objectives/hipa")]
    cast = make_weightless_cast(validate({**read_files(files), "data": {"prompts": "any"}}))
    assert sum(p.numel() for p in cast.student.trainable().values()) == 3_188_736


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"student": {"num_steps": 2}}, "student.num_steps: found 2"),
        ({"objective": {"name": "hipa", "cutoff": 1.0}}, "objective.cutoff"),
    ],
)
def test_mistakes_are_one_line(change, key):
    with pytest.raises(UserError, match=key):
        validate({"objective": {"name": "hipa"}, "data": {"name": "digits"}, **change})


def test_a_teacher_of_points_is_refused():
    from fastgen.training.assembly import make_cast

    cfg = validate({"teacher": {"path": "analytic:gmm2d-flow"}, "objective": {"name": "hipa"}})
    cast = make_cast(cfg)
    with pytest.raises(UserError, match="teacher of points"):
        cast.stage(cfg.all_stages()[0], rng())
