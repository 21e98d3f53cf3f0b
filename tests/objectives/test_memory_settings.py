"""Settings that save memory or time leave the losses of every method as they are."""

from functools import partial

import pytest
import torch

from fastgen.objectives import REGISTRY
from tests.objectives.test_contract import NETWORKS, make
from tests.support.heavier import some_of
from tests.support.play import batch, play

SETTINGS = {
    "recomputed": {"gradient_checkpointing": True},
    "recomputed selectively": {"gradient_checkpointing": "selective"},
    "channels last": {"channels_last": True},
}
BY_DEFAULT = [("ladd", "sana", "lora"), ("dmd2", "sd", "full")]
"""second derivatives through attention, and a batch for each of two players"""
EVERY = [
    (name, NETWORKS[(i + shift) % 5], kind)
    for i, name in enumerate(sorted(REGISTRY))
    for kind, shift in (("full", 0), ("lora", 3))
]
EVERY = [*BY_DEFAULT, *(case for case in EVERY if case not in BY_DEFAULT)]


def losses(name, teacher, kind, precision, train):
    """Of two steps, each turn under an autocast of its own as in the trainer."""
    torch.manual_seed(0)
    _, cast, objective = make(name, teacher, kind, **train)
    one = batch(cast)
    cast_down = partial(torch.autocast, "cpu", precision, enabled=precision is not torch.float32)
    return [loss for k in (0, 1) for _, loss in play(objective, one, k, around=cast_down)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "family", "kind"), some_of(EVERY, BY_DEFAULT))
def test_they_leave_the_losses_as_they_are(name, family, kind, precision, tiny):
    tolerance = {torch.float32: 5e-3, torch.bfloat16: 5e-2}[precision]
    wanted = losses(name, tiny(family), kind, precision, {})
    for setting, train in SETTINGS.items():
        found = losses(name, tiny(family), kind, precision, train)
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance / 25), setting
