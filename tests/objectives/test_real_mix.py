"""DMD2's teacher with a share of the critic's adapter (weak-to-strong matching): what it is, and its ends."""

import dataclasses

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from tests.objectives import test_contract as contract
from tests.support.play import batch


def weak_to_strong(tiny, monkeypatch, mix, kind="lora"):
    """(cast, objective) of three roles over one network, unguided, the critic's adapter away from zero."""
    monkeypatch.setitem(contract.SHORT, "dmd2", {"gan_weight": 0.0, "student_every": 1, "real_mix": mix})
    monkeypatch.setitem(contract.TEACHER, "dmd2", {"guidance": 1.0})
    _, cast, objective = contract.make("dmd2", tiny("flow"), kind)
    generator = torch.Generator().manual_seed(0)
    for p in cast.parts["critic"].trainable().values():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return cast, objective


def test_p1_real_mix_carries_a_share_of_the_critics_adapter(tiny, monkeypatch):
    """The teacher's score is that of its weights plus the share of the critic's; with all of it no gradient
    is left, with none it is the teacher's; the critic acts whole again afterwards.
    """
    found, plain, seen = {}, losses.distribution_matching, {}

    def heard(x, real, fake):
        seen.update(real=real, fake=fake)
        return plain(x, real, fake)

    monkeypatch.setattr(losses, "distribution_matching", heard)
    for mix in (0.0, 0.25, 1.0):
        cast, objective = weak_to_strong(tiny, monkeypatch, mix)
        one = batch(cast)
        loss, _ = next(objective.step(one, 0))
        found[mix] = float(loss.detach()), seen["real"], seen["fake"]
    assert found[1.0][0] == 0 and found[0.25][0] > 0 and found[0.0][0] > 0
    assert torch.equal(found[0.0][2], found[1.0][2]), "the critic acts whole"
    near, far = (float((found[m][1] - found[m][2]).abs().mean()) for m in (0.25, 0.0))
    assert 0 < near < far
    critic, t = cast.parts["critic"], torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        whole = critic(one.noise, t, one.cond)
        quarter = dataclasses.replace(critic, share=0.25)(one.noise, t, one.cond)
        torch.testing.assert_close(critic(one.noise, t, one.cond), whole)
        for name, p in critic.trainable().items():
            p.data *= 0.25 if "lora_B" in name else 1.0
        torch.testing.assert_close(critic(one.noise, t, one.cond), quarter)
    assert not torch.allclose(whole, quarter)


def test_real_mix_without_an_adapter_is_one_line(tiny, monkeypatch):
    with pytest.raises(UserError) as error:
        weak_to_strong(tiny, monkeypatch, 0.25, "full")
    assert "objective.real_mix: found 0.25 with a critic that is no adapter" in str(error.value)
    assert "set critic.kind to lora" in str(error.value) and "\n" not in str(error.value)
