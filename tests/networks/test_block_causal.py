"""Block-causal attention of a Wan transformer: the mask, the cache, positions, and the network as it was."""

import copy

import pytest
import torch

from fastgen.diffusion.schedules import Flow
from fastgen.families.wan import Wan, WanTokens
from fastgen.networks.backbone import Backbone
from fastgen.networks.block_causal import Pass, attach

BLOCK, FRAMES = 3, 9
COND = {"encoder_hidden_states": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))}
X = torch.randn(2, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(3))
T = torch.full((2,), 0.6, dtype=torch.float64)


def wan(patch=1, family=Wan, **config):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    more = {"text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32}
    net = WanTransformer3DModel(patch_size=(patch, 2, 2), **{**sizes, **more, **config})
    return Backbone(net.eval(), family(), Flow(), "flow")


def masked(backbone, x, t=T, window=0):
    """All blocks in one pass."""
    with torch.no_grad(), backbone.causally(Pass(BLOCK, window)):
        return backbone(x, t, COND)


def cached(backbone, x, t=T, window=0, together=1):
    """So many blocks at a time over the cache of those before, which are written at the same time t."""
    past, made = (), []
    for blocks in x.split(BLOCK * together, 2):
        now = Pass(BLOCK, window, past, write=True)
        with torch.no_grad(), backbone.causally(now):
            made.append(backbone(blocks, t, COND))
        past = now.memory()
    return torch.cat(made, 2)


@pytest.mark.parametrize("patch", [1, 3])
@pytest.mark.parametrize("window", [0, 1, 2, 3])
def test_p1_cached_decoding_is_the_masked_pass(patch, window):
    """Also for clips longer than the window, of which the cache keeps the end."""
    backbone, x = wan(patch), torch.cat([X, X.flip(2)], 2)
    assert (cached(backbone, x, window=window) - masked(backbone, x, window=window)).abs().max() < 1e-5


def test_p1_several_blocks_at_a_time_are_the_same():
    backbone, x = wan(), torch.cat([X, X.flip(2)[:, :, :3]], 2)
    assert (cached(backbone, x, together=2) - masked(backbone, x)).abs().max() < 1e-5


def test_p1_negative_attention_both_ways_and_another_window_are_other_numbers():
    backbone = wan()
    with torch.no_grad():
        both = backbone(X, T, COND)
    found = [both, *(masked(backbone, X, window=w) for w in (0, 1, 2))]
    gaps = [(a - b).abs().max() for i, a in enumerate(found) for b in found[:i]]
    assert min(gaps) > 1e-3
    torch.testing.assert_close(masked(backbone, X, window=3), found[1], rtol=0, atol=1e-6)


def test_p1_a_later_block_changes_no_earlier_one():
    """Block 1 changed: block 0 stays to the bit, 1 and 2 move. Looking both ways block 0 moves too."""
    backbone, other = wan(), X.clone()
    other[:, :, 3:6] += 1
    gap = (masked(backbone, X) - masked(backbone, other)).abs().amax((0, 1, 3, 4))
    assert gap[:3].max() == 0 and gap[3:].min() > 1e-4
    with torch.no_grad():
        assert (backbone(X, T, COND) - backbone(other, T, COND)).abs()[:, :, :3].max() > 1e-4


def test_p1_frames_of_a_block_see_each_other():
    """The mask is of blocks, not of frames: the last frame of block 1 reaches its first."""
    backbone, other = wan(), X.clone()
    other[:, :, 5] += 1
    gap = (masked(backbone, X) - masked(backbone, other)).abs().amax((0, 1, 3, 4))
    assert gap[:3].max() == 0 and gap[3] > 1e-4


def test_p1_positions_continue_in_the_cache():
    """A block over the cache is not what it would be at the positions of the first."""
    backbone = wan()
    control = attach(backbone.net)
    right = cached(backbone, X)

    class Restarting(type(control)):
        def rotary(self, rope, args, output):
            found = super().rotary(rope, args, output)
            if found is None:
                return None
            times = found[0].shape[1] // output[0].shape[1]
            return tuple(o.repeat(1, times, 1, 1) for o in output)

    control.__class__ = Restarting
    backbone.net.rope._forward_hooks.clear()
    backbone.net.rope.register_forward_hook(control.rotary)
    assert (cached(backbone, X) - right)[:, :, 3:].abs().max() > 1e-4


@pytest.mark.parametrize("patch", [1, 3])
@pytest.mark.parametrize("family", [Wan, WanTokens])
def test_p1_times_of_frames_are_those_of_their_blocks(family, patch):
    """One time written for every frame is that time; a block's own time moves it and what attends to it."""
    backbone = wan(patch, family)
    every = T[:, None].expand(-1, FRAMES)
    torch.testing.assert_close(masked(backbone, X, every), masked(backbone, X), rtol=0, atol=1e-5)
    later = every.clone()
    later[:, 3:6] = 0.2
    gap = (masked(backbone, X, later) - masked(backbone, X)).abs().amax((0, 1, 3, 4))
    assert gap[:3].max() < 1e-5 and gap[3:].min() > 1e-4


def test_p1_without_a_pass_it_is_the_network_as_it_was():
    backbone = wan()
    with torch.no_grad():
        before = backbone(X, T, COND)
        masked(backbone, X)
        assert torch.equal(backbone(X, T, COND), before)
    assert attach(backbone.net) is attach(backbone.net)
    state = {name: value.shape for name, value in wan().net.state_dict().items()}
    assert {name: value.shape for name, value in backbone.net.state_dict().items()} == state


def test_p1_a_copy_has_a_pass_of_its_own():
    """A student copied from a causal network does not put that one into its passes."""
    backbone = wan()
    masked(backbone, X)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        both = backbone(X, T, COND)
        with other.causally(Pass(BLOCK)):
            assert torch.equal(backbone(X, T, COND), both)
            assert not torch.equal(other(X, T, COND), both)


def test_p1_checkpointed_gradients_are_the_plain_ones():
    """A layer is computed again over the cache of its own pass, whichever passes came since."""
    grads = []
    for on in (False, True):
        backbone = wan()
        backbone.net.train()
        if on:
            backbone.enable_gradient_checkpointing()
        first = Pass(BLOCK, 0, write=True)
        with torch.no_grad(), backbone.causally(first):
            backbone(X[:, :, :3], T, COND)
        with backbone.causally(Pass(BLOCK, 0, first.memory())):
            loss = backbone(X[:, :, 3:6], T, COND).square().mean()
        masked(backbone, X)
        loss.backward()
        grads.append({n: p.grad for n, p in backbone.net.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for key, plain in grads[0].items():
        torch.testing.assert_close(grads[1][key], plain, rtol=1e-4, atol=1e-7)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="no WanTransformer3DModel"):
        attach(torch.nn.Linear(2, 2))
    backbone = wan()
    backbone.net.fuse_qkv_projections()
    with pytest.raises(ValueError, match="separate projections"):
        attach(backbone.net)
