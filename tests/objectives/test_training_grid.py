"""One grid for training and sampling: a student's steps begin and end at the very times of its training."""

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import EDM, VP, Flow, TrigFlow
from fastgen.networks.analytic import GaussianMixture
from fastgen.objectives.consistency import Consistency
from fastgen.sampling.solvers import segment_ends
from fastgen.training.assembly import make_cast
from tests.support.spelled import World

SEGMENTED = {
    "consistency": {"metric": "l2"},
    "pcm": {"gan_weight": 0.0},
    "tscd": {"gan_weight": 0.0, "end_prob": 1.0},
}
GRIDS = [(32, 4, 4), (12, 3, 3), (12, 3, 6), (20, 4, 4), (16, 8, 8), (7, 7, 7)]
"""steps of the grid, segments, steps of the student"""


@pytest.fixture(autouse=True)
def unfitted(monkeypatch):
    """Networks as they come: their outputs do not matter here."""
    fit = GaussianMixture.trainable_copy
    monkeypatch.setattr(GaussianMixture, "trainable_copy", lambda self: fit(self, 1))


def cast(teacher, num_steps, objective):
    cfg = validate(
        {
            "teacher": {"path": f"analytic:gmm2d-{teacher}", "guidance": 1.0},
            "student": {"num_steps": num_steps, "sampler": "ode"},
            "objective": objective,
        }
    )
    return make_cast(cfg).stage(cfg.all_stages()[0], Rng(0))


def steps_trained(monkeypatch, objective):
    """(sampled times, the times at which the student's trained steps begin, and those at which they end)."""
    schedule, seen = objective.schedule, []
    step = schedule.ode_step
    monkeypatch.setattr(
        schedule, "ode_step", lambda D, x, t, u: (seen.append((t, u)), step(D, x, t, u))[1], raising=False
    )
    x0, labels = torch.randn(2000, 2), {"class_labels": torch.zeros(2000, dtype=torch.long)}
    next(objective.step(Batch(x0, labels, labels, x0, torch.arange(2000)), 0))
    begin, end = (set(v.tolist()) for v in seen[-1])  # the last step is that of the student's prediction
    return objective.student.times, begin, end


@pytest.mark.parametrize("teacher", ["vp", "flow", "edm"])
@pytest.mark.parametrize("name", SEGMENTED)
def test_p1_steps_are_sampled_where_they_were_trained(name, teacher, monkeypatch):
    for grid, segments, num_steps in GRIDS:
        size = "num_scales" if name == "consistency" else "grid_steps"
        settings = {"name": name, size: grid, "segments": segments, **SEGMENTED[name]}
        objective = cast(teacher, num_steps, settings)
        sampled, begin, end = steps_trained(monkeypatch, objective)
        ends = sorted({*end, sampled[0]} - {objective.schedule.t_min}, reverse=True)
        assert set(sampled) <= begin and len(begin) == grid, (grid, segments, sampled)
        assert set(ends) <= set(sampled) and len(ends) == segments, (grid, segments, sampled, ends)
        if num_steps == segments:
            assert ends == sampled


def test_p1_the_rounded_grid_is_another_one():
    """Negative check: rounding 999 u gives edges one timestep off those of the samplers, or of their grid."""
    S = VP.scaled_linear()
    rounded = S.from_unit(torch.linspace(1, 0, 33, dtype=torch.float64))
    assert rounded[::8].tolist() == [999, 749, 500, 250, 0] and S.steps(4) == [999, 749, 499, 249]
    assert S.training_grid(32)[::8] == [991, 743, 495, 247, 0] == [*S.student_times(4, 32), 0]
    assert S.training_grid(12)[::4] == [995, 663, 331, 0] == [*S.student_times(3, 12), 0]


def test_p1_a_growing_grid_keeps_the_edges_of_its_segments():
    for S in (VP.scaled_linear(), Flow(), Flow(3.0), EDM(), TrigFlow()):
        final, few = S.training_grid(96, 96), S.training_grid(12, 96)
        at, coarse = segment_ends(96, 3).unique().tolist(), segment_ends(12, 3).unique().tolist()
        assert [few[i] for i in coarse] == pytest.approx([final[i] for i in at], rel=1e-12), S
        assert all(a > b for a, b in zip(few, few[1:]))


def test_p1_step_grids_of_a_curriculum_share_the_edges_of_their_segments():
    cfg = {"num_scales": 96, "start_scales": 12, "curriculum_steps": 10, "segments": 3}
    objective = World(Consistency, VP.scaled_linear(), **cfg).objective
    first, last = objective.grid(0), objective.grid(10)
    assert len(first) == 13 and len(last) == 97
    assert first[4::4].tolist() == last[32::32].tolist() != VP.scaled_linear().training_grid(12)[4::4]


def test_p1_a_stretched_teacher_does_not_stretch_its_student(monkeypatch):
    """Qwen-Image's and LTX-Video's grids end before clean data; a student of theirs is not sampled so."""
    S = Flow(terminal=0.02)
    for name in ("pcm", "tscd", "lcm"):
        settings = {"name": name, "grid_steps": 8, **SEGMENTED.get(name, {})}
        objective = cast("flow", 4 if name == "lcm" else 8, settings)
        objective.schedule = objective.student.backbone.schedule = S
        _, begin, _ = steps_trained(monkeypatch, objective)
        assert begin == set(S.student_times(8)) != set(S.teacher_times(8)), name


def test_a_grid_finer_than_the_timesteps_is_refused():
    with pytest.raises(UserError, match="grid of 1280 steps.*1000 timesteps"):
        cast("vp", 1, {"name": "consistency", "num_scales": 1280})
    cast("edm", 1, {"name": "consistency", "num_scales": 1280})
