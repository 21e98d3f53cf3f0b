"""Rollouts of students that go block by block: their calls, their cache, and where gradient flows."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.roles.causal import CausalStudent, check_frames, check_window, make_student
from fastgen.roles.roles import Student, StudentSpec
from tests.networks.test_block_causal import COND, wan
from tests.support.causal import Linear, linear_student

NOISE = torch.randn(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
TIMES = (1.0, 0.75, 0.5, 0.25)


def drawing():
    """(randn_like, what it has drawn)."""
    generator, drawn = torch.Generator().manual_seed(5), []

    def randn_like(x):
        drawn.append(torch.randn(x.shape, dtype=x.dtype, generator=generator))
        return drawn[-1]

    return randn_like, drawn


@pytest.mark.parametrize("last", range(4))
def test_p1_a_block_stops_after_its_step_with_one_call_that_has_gradient(last):
    """Of each block: the steps before without gradient, that step with it, then the clean block is shown to
    the network for the cache, but for the last one's.
    """
    student, (randn_like, drawn) = linear_student(TIMES), drawing()
    x = student.generate(NOISE, {}, randn_like, last)
    seen = student.backbone.seen
    wanted = []
    for block in range(3):
        wanted += [(t, t == TIMES[last], False) for t in TIMES[: last + 1]]
        wanted += [(0.0, False, True)] * (block < 2)
    assert [(float(t[0]), grad, now.write) for _, t, grad, now in seen] == wanted
    assert len(drawn) == 3 * last
    assert torch.equal(seen[0][0], NOISE[:, :, :1]) and x.shape == NOISE.shape
    kept = [call[0] for call in seen if call[3].write]
    assert torch.equal(torch.cat(kept, 2), x[:, :, :2].detach())


def test_p1_what_enters_the_next_step_is_the_estimate_noised_anew():
    student, (randn_like, drawn) = linear_student(TIMES, back=0.5), drawing()
    student.generate(NOISE, {}, randn_like, 1)
    seen = list(student.backbone.seen)
    for block, (first, second) in enumerate((seen[:2], seen[3:5])):  # the second one over the first
        made = student.over(first[3].past, first[0], first[1], {})
        assert bool(first[3].past) == bool(block)
        torch.testing.assert_close(second[0], 0.25 * made + 0.75 * drawn[block])


def test_p1_each_block_may_stop_after_a_step_of_its_own():
    student, (randn_like, _) = linear_student(TIMES), drawing()
    student.generate(NOISE, {}, randn_like, [2, 0, 1])
    ends = [float(t[0]) for _, t, grad, _ in student.backbone.seen if grad]
    assert ends == [0.5, 1.0, 0.75]


def test_p1_no_gradient_leads_from_a_block_back_through_the_cache():
    """Frame 2 does not know the weight of frame 0, nor block 1 the noise of block 0; under the mask, in one
    pass, it does.
    """
    student = linear_student(back=0.5)
    x = student.generate(NOISE, {}, drawing()[0])
    (first,) = torch.autograd.grad(x[:, :, 2].sum(), student.backbone.first, allow_unused=True)
    assert first is None or first == 0
    assert torch.autograd.grad(
        student.generate(NOISE, {}, drawing()[0])[:, :, 0].sum(), student.backbone.first
    )[0]
    net = CausalStudent(wan(), None, StudentSpec((1.0,), block=3))
    noise = torch.randn(2, 4, 6, 4, 4, requires_grad=True)
    made = net.generate(noise, COND, drawing()[0])[:, :, 3:]
    (back,) = torch.autograd.grad(made.sum(), noise)
    assert back[:, :, :3].abs().max() == 0 and back[:, :, 3:].abs().max() > 1e-3
    (back,) = torch.autograd.grad(net(noise, net.time(0, noise), COND)[:, :, 3:].sum(), noise)
    assert back[:, :, :3].abs().max() > 1e-5


def test_p1_the_cache_holds_clean_blocks():
    """Block 1 of a rollout is a block over the sample of block 0 at time 0, not over its noise."""
    student = CausalStudent(wan(), None, StudentSpec((1.0,), block=3))
    noise = torch.randn(2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(6))
    x = student.generate(noise, COND, drawing()[0]).detach()
    t = torch.zeros(2, 6, dtype=torch.float64)
    t[:, 3:] = 1
    with torch.no_grad():
        shown = student(torch.cat([x[:, :, :3], noise[:, :, 3:]], 2), t, COND)
        noisy = student(noise, torch.ones_like(t), COND)
    assert (shown - x).abs().max() < 1e-5
    assert (noisy - x)[:, :, 3:].abs().max() > 1e-4


def test_p1_a_short_window_forgets_the_oldest_block():
    """With a window of two, frame 2 of three sees frame 1 alone: frame 0 has no say in what it attends to."""
    for window, held in ((0, [0, 1, 2]), (3, [0, 1, 2]), (2, [0, 1, 1]), (1, [0, 0, 0])):
        student = linear_student(window=window)
        student.generate(NOISE, {}, drawing()[0])
        sizes = [
            now.past[0][0].shape[1] if now.past else 0
            for _, _, _, now in student.backbone.seen
            if not now.write
        ]
        assert sizes == held, window


def test_the_spec_says_which_student_it_is():
    made = make_student(Linear(), None, StudentSpec((1.0, 0.5), block=1))
    assert isinstance(made, CausalStudent) and made.nfe == 3 and isinstance(made.with_steps(1), CausalStudent)
    assert made.with_window(2).spec.window == 2 and made.num_blocks(NOISE) == 3
    plain = make_student(Linear(), None, StudentSpec((1.0, 0.5)))
    assert type(plain) is Student and plain.nfe == 2 and plain.num_blocks(NOISE) == 1


def test_frames_and_caches_that_do_not_fit_are_refused():
    check_frames(3, 9, "--num_frames")
    check_window(3, 3, "--cache_blocks")
    with pytest.raises(UserError, match="10 latent frames are no whole blocks of 3; give 9 or 12 frames"):
        check_frames(3, 10, "--num_frames")
    with pytest.raises(UserError, match="give 9 or 21 frames"):
        check_frames(3, 4, "--num_frames", per=4)
    with pytest.raises(UserError, match="found 4 blocks"):
        check_window(4, 3, "--cache_blocks")
