"""Guidance at low noise: what a consistency method learns there is the guided teacher's, not the data's.

The teacher is N(1, 0.5^2) under the condition and N(0, 0.5^2) without, so that at guidance 3 it is
N(3, 0.5^2) exactly, while the data, to which low noise levels are near, have mean 1.
"""

import pytest
import torch

from fastgen.core.batch import Batch
from fastgen.diffusion.schedules import EDM, Flow
from fastgen.objectives import REGISTRY
from fastgen.roles.roles import Role, Student, StudentSpec
from tests.support.toys import SCHEDULES, FlowMap, GaussianNet, fit, rng

STD = 0.5


class Conditional(GaussianNet):
    """Exact denoiser of N(cond, s^2)."""

    def forward(self, x_t, t, cond):
        return super().forward(x_t - self.schedule.alpha(t)[:, None] * cond["mean"], t, {}) + cond["mean"]

    raw = forward


def make(name, S, student, w, **cfg):
    parts = {
        "student": Student(student, None, StudentSpec(S.steps(1))),
        "previous": Role(FlowMap(S, student.m.item(), student.s.item()).requires_grad_(False)),
        "teacher": Role(Conditional(S, 0.0, STD).requires_grad_(False)),
    }
    objective = REGISTRY[name](REGISTRY[name].config(**cfg), parts, rng(), w)
    objective.prepare()
    return objective


def conditional_batch(num):
    x0 = 1 + STD * torch.randn(num, 1, dtype=torch.float64)
    cond, uncond = {"mean": torch.ones_like(x0)}, {"mean": torch.zeros_like(x0)}
    return Batch(x0, cond, uncond, torch.randn_like(x0), torch.arange(num))


LOW = {"kind": "log_normal", "mean": -4.0, "std": 0.3}
PLAIN = {"time": LOW, "warmup_steps": 0}
CASES = {  # settings under which low noise alone is drawn, or is drawn by the test
    "ect": {"source": "teacher", "time": LOW},
    "ect late": {"source": "teacher", "time": LOW, "q": 64.0},
    "tcm": {"source": "teacher", "boundary": 0.02, "max_level": 0.04, "gap": 0.5},
    "consistency": {"num_scales": 40},
    "consistency heun": {"num_scales": 40, "solver": "heun"},
    "consistency curriculum": {"start_scales": 40, "num_scales": 80, "curriculum_steps": 10},
    "consistency x0": {"num_scales": 40, "space": "x0", "metric": "l2"},
    "pcm": {"grid_steps": 40, "segments": 1, "gan_weight": 0.0},
    "tscd": {"grid_steps": 40, "segments": 1, "end_prob": 1.0},
    "lcm": {"grid_steps": 40},
    "scm": {**PLAIN, "adaptive": False},
    "sana_sprint": {"scm": {**PLAIN, "adaptive": False}, "gan_weight": 0.0},
    "meanflow": {"time": {"kind": "logit_normal", "mean": -2.5}, "flow_ratio": 0.0},
    "ayf": {"gap_mean": -3.0, "warmup_steps": 0},
    "ayf lmd": {"loss": "lmd", "gap_mean": -3.0, "warmup_steps": 0},
}


def loss_of(case, mean, w):
    """Loss of the exact flow map of N(mean, 0.5^2), at low noise."""
    S = Flow()
    objective = make(case.split()[0], S, FlowMap(S, mean, STD), w, **CASES[case])
    objective.rng.randint = lambda high, num: high - 1 - torch.arange(num) % (high // 8)  # near the data
    torch.manual_seed(0)
    return float(next(objective.step(conditional_batch(256), 0))[0].detach())


@pytest.mark.parametrize("case", CASES)
def test_p1_low_noise_learns_the_guided_teacher(case):
    """The guided law's flow map has the lower loss, under guidance 3; without guidance the data's has.

    A single Euler step to clean data, the target of ect's first gap, is half as far from it: 0.5. Guidance
    left out makes the ratio 1 or more.
    """
    for w, right, wrong in ((3.0, 3.0, 1.0), (1.0, 1.0, 3.0)):
        assert loss_of(case, right, w) < 0.6 * loss_of(case, wrong, w), w


@pytest.mark.parametrize("S", SCHEDULES.values(), ids=SCHEDULES)
def test_p1_ect_takes_the_teachers_own_step_where_r_is_clean(S):
    """Guided mean 3, data mean 1: the first gap, at which r is clean at low noise, and later ones."""
    for double_every, low, high in ((0, 2.7, 3.4), (50, 2.9, 3.1)):
        student = FlowMap(S, 0.0, 1.0)
        objective = make("ect", S, student, 3.0, source="teacher", double_every=double_every)
        fit(objective, lambda rng: conditional_batch(256), 250)
        assert low < student.m.item() < high, (double_every, student.m.item())


def test_p1_ect_with_the_data_as_target_forgets_guidance(monkeypatch):
    """Negative check: the data point as the target where r is clean leaves the student near its mean."""
    from fastgen.objectives import ect

    step = ect.earlier
    monkeypatch.setattr(ect, "earlier", lambda obj, batch, *rest: (batch.x0, step(obj, batch, *rest)[1]))
    student = FlowMap(EDM(), 0.0, 1.0)
    fit(make("ect", EDM(), student, 3.0, source="teacher"), lambda rng: conditional_batch(256), 250)
    assert student.m.item() < 1.6
