"""Perp-neg: its weights over the azimuth, the perpendicular part, and that a step of each method takes it."""

import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives import REGISTRY, requirements_of
from fastgen.objectives.sds import SDS, SDSConfig
from fastgen.objectives.shared.perp_neg import ABOVE, BACK, FRONT, SIDE, against, mixed, perpendicular
from fastgen.threed.cameras import Cameras
from fastgen.threed.gaussians import GaussianAsset
from tests.support.scenes import asset_student, role, seen_from
from tests.support.spelled import World
from tests.support.toys import rng


def seen(*azimuths, elevation=10.0):
    row = torch.tensor([[a, elevation, 2.2, 48.0] for a in azimuths])
    return Cameras.of(row)


def test_the_weights_over_the_azimuth():
    """The view itself is not kept away from, the one beside it is; from behind, the front is by 1.57."""
    plan = against(seen(0.0, 90.0, 180.0, -45.0, 200.0))
    assert plan.pair.tolist() == [[FRONT, SIDE], [SIDE, BACK], [SIDE, BACK], [FRONT, SIDE], [SIDE, BACK]]
    torch.testing.assert_close(plan.share, torch.tensor([1.0, 1.0, 0.0, 0.5, 2 - 160 / 90]))
    assert plan.negative.tolist()[0] == [FRONT, SIDE] and plan.negative.tolist()[1] == [SIDE, FRONT]
    half = 4 * torch.tensor(-0.25).exp() - 2.426
    wanted = torch.tensor([[-0.0001, -1.574], [-0.0005, -1.5735], [-0.394, -1.967], [-half, -half]])
    torch.testing.assert_close(plan.weight[:4], wanted, rtol=0, atol=5e-4)
    assert (plan.weight <= 0).all()
    torch.testing.assert_close(against(seen(30.0)).weight, against(seen(-30.0)).weight)
    above = against(seen(10.0, 170.0, elevation=70.0))
    assert (above.pair == ABOVE).all() and (above.weight == 0).all()


def test_only_what_is_perpendicular_is_taken_away():
    generator = torch.Generator().manual_seed(0)
    null, positive, other = torch.randn(3, 5, 4, 2, generator=generator, dtype=torch.float64)
    weight = -torch.rand(5, 1, generator=generator, dtype=torch.float64)
    sought = positive - null
    plain = perpendicular(null, positive, [other], 0 * weight, 3.0)
    torch.testing.assert_close(plain, null + 3.0 * sought)
    more = perpendicular(null, positive, [other], weight, 3.0) - plain
    assert (more * sought).flatten(1).sum(1).abs().max() < 1e-12 and more.abs().max() > 0.1
    assert ((more * (other - null)).flatten(1).sum(1) < 0).all(), "away from the other"
    same = perpendicular(null, positive, [null + 2 * sought], weight, 3.0)
    torch.testing.assert_close(same, plain)  # a negative that points where the prompt does takes nothing
    naive = null + 3.0 * (sought + weight[:, :, None] * 2 * sought)
    assert (naive - plain).abs().max() > 0.1, "the negative prompt alone would turn back"
    still = perpendicular(null, null, [other], weight, 3.0)
    assert still.isfinite().all()


def test_prompts_are_mixed_and_masks_are_not():
    table = {"text": torch.arange(8.0).view(4, 2), "mask": torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]])}
    pair = torch.tensor([[FRONT, SIDE], [SIDE, BACK]])
    found = mixed(table, pair, torch.tensor([0.25, 1.0]))
    assert found["text"].tolist() == [[1.5, 2.5], [2.0, 3.0]] and found["mask"].tolist() == [[1, 0], [1, 1]]


class Said(Denoiser):
    """Answers the word of the view, which it notes."""

    prediction = "x0"

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.heard = schedule, []

    def forward(self, x_t, t, cond):
        self.heard.append(cond["word"])
        return 0.2 * x_t + cond["word"][:, :1, None, None] + 0.5 * cond["word"][:, 1:, None, None] * x_t

    raw = forward


WORDS = torch.tensor([[0.3, 0.0], [0.0, 0.4], [-0.3, 0.1], [0.1, -0.2]])


def step(perp_neg):
    """(gradients of a step of SDS, what the teacher was asked)."""
    S = VP.scaled_linear()
    teacher = Said(S)
    one = seen_from(3, 0)
    cond = {**one.cond, "word": WORDS[[0, 1, 2]]}
    null = {**one.cond, "word": torch.zeros(3, 2)}
    batch = Batch(None, cond, null, one.noise, one.index, views={"word": WORDS})
    parts = {"student": asset_student([GaussianAsset(20)]), "teacher": role(teacher)}
    objective = SDS(SDSConfig(asset={"perp_neg": perp_neg}), parts, rng(), 5.0)
    objective.rng.reset(0)
    next(objective.step(batch, 0))[0].backward()
    return [p.grad for p in objective.student.trainable().values()], teacher.heard, batch


def test_p1_step_asks_four_prompts_and_goes_another_way():
    grads, heard, batch = step(True)
    (words,) = heard
    null, sought, first, second = words.chunk(4)
    plan = against(Cameras.of(batch.cond["camera"]))
    assert (null == 0).all() and torch.equal(first, WORDS[plan.negative[:, 0]])
    assert torch.equal(second, WORDS[plan.negative[:, 1]])
    torch.testing.assert_close(sought, mixed({"word": WORDS}, plan.pair, plan.share)["word"])
    other, (pair,), _ = step(False)
    assert len(pair) == 6 and not all(torch.equal(a, b) for a, b in zip(grads, other))


@pytest.mark.parametrize("name", ["sds", "vsd", "asd", "uni_instruct_3d"])
def test_it_costs_two_passes_more_and_is_for_assets(name, tiny):
    calls = [
        requirements_of(REGISTRY[name].config(asset={"perp_neg": on})).network_calls(7.5, 1)["teacher"]
        for on in (False, True)
    ]
    assert calls[1] - calls[0] == 2
    S = VP.scaled_linear()
    with pytest.raises(UserError, match="objective.asset"):
        World(REGISTRY[name], S, asset={"perp_neg": True})


def test_bsd_has_directions_of_its_own():
    parts = {"student": asset_student([GaussianAsset(5)]), "teacher": role(Said(VP.scaled_linear()))}
    with pytest.raises(UserError, match="perp_neg"):
        REGISTRY["bsd"](REGISTRY["bsd"].config(asset={"perp_neg": True}), parts, rng())


def test_a_run_takes_the_setting(tiny):
    values = {"teacher": {"path": str(tiny("sd"))}, "student": {"asset": {"points": 9}}}
    values |= {
        "data": {"views": {"prompt": "a bag"}},
        "objective": {"name": "sds", "asset": {"perp_neg": True}},
    }
    assert validate(values).objective.asset.perp_neg
