"""Clips of the bundled set: each score tells apart what it is meant to."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.data import moving
from fastgen.evaluation.metrics import fvd_mini
from fastgen.evaluation.metrics.fd_mini import attributes_from, measurer_for
from fastgen.evaluation.metrics.fvd_mini import ClipMeasurer

NUM = 48


@pytest.fixture(scope="module")
def measurer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fvd_mini, "HELD", 200)
        fvd_mini._reference.cache_clear()
        yield ClipMeasurer()
    fvd_mini._reference.cache_clear()


@pytest.fixture(scope="module")
def real() -> moving.Clips:
    return moving.load_clips("train", range(NUM))


def scores(measurer, clips, real):
    return measurer.compare(clips, real.attributes)


def test_real_blurred_and_noise_are_in_this_order(measurer, real):
    clips = real.images.float() / 255
    noise = torch.rand(clips.shape, generator=torch.Generator().manual_seed(0))
    found = [scores(measurer, (1 - c) * clips + c * noise, real) for c in (0, 0.3, 1)]
    for key in ("fvd_mini", "fd_mini"):
        values = [one[key] for one in found]
        assert values == sorted(values) and values[2] > 2 * values[0], key
    assert found[0]["agreement"] > found[2]["agreement"]
    assert found[0]["frame_consistency"] > found[2]["frame_consistency"]


def test_clips_that_stand_still_are_found_out(measurer, real):
    """Their frames are as good as ever: what is missing is the motion, and three scores say so."""
    clips = real.images.float() / 255
    frozen = clips[:, :, [moving.FRAMES // 2]].expand_as(clips)
    true, still = scores(measurer, clips, real), scores(measurer, frozen, real)
    assert still["fvd_mini"] > 1.5 * true["fvd_mini"]
    assert still["dynamic_degree"] < 0.01 < 0.5 < true["dynamic_degree"]
    assert still["agreement_motion"] < 0.4 < 0.9 < true["agreement_motion"]
    assert abs(still["agreement_colour"] - true["agreement_colour"]) < 0.1
    assert true["frame_consistency"] < 0.999 < still["frame_consistency"]


def test_backwards_is_another_motion(measurer, real):
    rows = torch.isin(real.attributes["motion"], torch.arange(6))  # left to shrink
    clips = real.images[rows].flip(2).float() / 255
    wanted = {"motion": real.attributes["motion"][rows]}
    opposite = {"motion": torch.tensor([1, 0, 3, 2, 5, 4])[wanted["motion"]]}
    assert measurer.compare(clips, wanted)["agreement"] < 0.1
    assert measurer.compare(clips, opposite)["agreement"] > 0.85


def test_the_floor_is_that_of_real_clips(measurer):
    floor = measurer.floor(40)
    assert floor["agreement_motion"] > 0.9 and 0.6 < floor["dynamic_degree"] < 1.1
    assert set(floor) == set(
        scores(measurer, torch.rand(6, 3, 9, 32, 32), moving.load_clips("train", range(6)))
    )


def test_who_asks_for_it(measurer):
    assert isinstance(measurer_for({"measure": "moving"}), ClipMeasurer)
    with pytest.raises(UserError, match="measuring net takes"):
        measurer.compare(torch.rand(4, 3, 5, 32, 32), {})
    with pytest.raises(UserError, match="nothing measures what is left"):
        measurer_for("moving", without=(("colour", 0),))
    found = attributes_from("moving", ["a red dress on a grey background turning", "a boot"])
    assert found["motion"].tolist() == [moving.MOTIONS.index("turn"), -1]
    assert found["garment"].tolist() == [3, 9]
    assert len(measurer.describe()["extractor"]) > 40
