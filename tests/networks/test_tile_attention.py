"""Attention in tiles: masks, kernels, the processors of Wan and CogVideoX, and networks as they were."""

import copy
import json

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow
from fastgen.families.wan import Wan
from fastgen.networks import tile_attention
from fastgen.networks.backbone import Backbone
from fastgen.networks.tile_attention import (
    attach,
    attend,
    document,
    evenly,
    kernel_for,
    layers_of,
    load_tiles,
    parse,
    share_of_tiles,
    tile_count,
    tile_mask,
    token_mask,
)

FRAMES = 6
X = torch.randn(2, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(3))
TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))


def wan(**config):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    more = {"text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32}
    return WanTransformer3DModel(**{"patch_size": (1, 2, 2), **sizes, **more, **config}).eval()


def cogvideox(**config):
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    more = {"text_embed_dim": 16, "time_embed_dim": 8, "num_layers": 2, "sample_width": 4, "sample_height": 4}
    kept = {"sample_frames": 21, "max_text_seq_length": 5, "use_rotary_positional_embeddings": True}
    return CogVideoXTransformer3DModel(**{**sizes, **more, **kept, **config}).eval()


def answer(net, x=X):
    """The network's prediction, frames on axis 2 as in x."""
    t = torch.full((2,), 600.0)
    with torch.no_grad():
        if type(net).__name__.startswith("Wan"):
            return net(x, t, TEXT, return_dict=False)[0]
        tokens = torch.arange(x.shape[2] * 4)[:, None] * torch.linspace(0.1, 1, 12)
        rotary = tokens.cos(), tokens.sin()
        given = {"encoder_hidden_states": TEXT, "timestep": t.long(), "image_rotary_emb": rotary}
        return net(hidden_states=x.transpose(1, 2), **given, return_dict=False)[0].transpose(1, 2)


NETS = {"wan": wan, "cogvideox": cogvideox}
each = pytest.mark.parametrize("name", NETS)


def sparse(net, *globals_of_layers, frames=FRAMES):
    """The network under a plan."""
    attach(net).plan().copy_(torch.tensor([frames, *globals_of_layers]))
    return net


# -- masks ---------------------------------------------------------------------------------------------------
def test_p1_tiles_are_counted_as_the_paper_counts_them():
    for frames in range(1, 12):
        for num in range(frames + 1):
            kept = sum(
                i == j or i in evenly(frames, num) or j in evenly(frames, num)
                for i in range(frames)
                for j in range(frames)
            )
            assert tile_mask(frames, evenly(frames, num)).sum() == kept == tile_count(frames, num)
    assert tile_count(8, 2) == 34 and tile_count(8, 8) == 64
    assert share_of_tiles(8, [2, 8]) == pytest.approx((34 + 64) / 128)


def test_p1_global_frames_are_evenly_spaced_and_the_first_is_one():
    assert evenly(8, 2) == (0, 4) and evenly(9, 3) == (0, 3, 6) and evenly(5, 5) == (0, 1, 2, 3, 4)
    assert all(
        evenly(f, m)[0] == 0 and len(set(evenly(f, m))) == m for f in range(1, 9) for m in range(1, f + 1)
    )


def test_p1_text_is_dense_in_both_directions():
    mask = token_mask(4, 3, (0,), 5, "cpu")
    assert mask.shape == (17, 17) and mask[:5].all() and mask[:, :5].all()
    assert torch.equal(mask[5::3, 5::3], tile_mask(4, (0,))) and not mask.all()


# -- kernels -------------------------------------------------------------------------------------------------
def loops(query, key, value, frames, chosen, text):
    """Attention token by token, written out."""
    per, out = (query.shape[1] - text) // frames, torch.zeros_like(query)
    frame_of = lambda n: -1 if n < text else (n - text) // per  # noqa: E731
    for i in range(query.shape[1]):
        kept = [
            j
            for j in range(query.shape[1])
            if min(frame_of(i), frame_of(j)) < 0
            or frame_of(i) == frame_of(j)
            or frame_of(i) in chosen
            or frame_of(j) in chosen
        ]
        scores = torch.einsum("bhd,bjhd->bhj", query[:, i], key[:, kept]) / query.shape[-1] ** 0.5
        out[:, i] = torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), value[:, kept])
    return out


def qkv(frames=5, per=3, text=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, text + frames * per, 2, 16, generator=generator).unbind(0)


@pytest.mark.parametrize("text", [0, 4])
@pytest.mark.parametrize("chosen", [(), (0,), (0, 2), (1, 4)])
@pytest.mark.parametrize("kernel", ["boolean", "parts", "flex"])
def test_p1_every_kernel_is_the_loop(kernel, chosen, text):
    """With and without text, also for frames that are not evenly spaced; another mask is another number."""
    given = qkv(text=text)
    wanted = loops(*given, 5, chosen, text)
    found = attend(*given, 5, chosen, text, kernel=kernel)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (attend(*given, 5, (3,), text, kernel=kernel) - wanted).abs().max() > 1e-2


def test_p1_gradients_of_the_parts_are_those_under_the_mask():
    found = []
    for kernel in ("boolean", "parts"):
        given = [x.clone().requires_grad_() for x in qkv(text=2)]
        attend(*given, 5, (0, 2), 2, kernel=kernel).square().sum().backward()
        found.append([x.grad for x in given])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.abs().max() > 0.1


def test_one_function_chooses_the_kernel():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernel_for(cuda, 100) == kernel_for(cuda, 100_000) == "flex"
    assert kernel_for(cpu, 144) == "boolean" and kernel_for(cpu, 5000) == "parts"


# -- networks ------------------------------------------------------------------------------------------------
@each
def test_p1_all_frames_global_or_one_frame_is_the_dense_network(name):
    """To the bit, and so is a network that was made able and has no masks."""
    net, single = NETS[name](), X[:, :, :1]
    dense, of_one = answer(net), answer(net, single)
    attach(net)
    assert torch.equal(answer(net), dense)
    assert torch.equal(answer(sparse(net, FRAMES, FRAMES)), dense)
    assert torch.equal(answer(sparse(net, 1, 1, frames=1), single), of_one)
    assert (answer(sparse(net, 1, FRAMES)) - dense).abs().max() > 1e-4


@each
@pytest.mark.parametrize("kernel", ["boolean", "parts"])
def test_p1_the_processor_is_attention_in_loops(name, kernel, monkeypatch):
    """Under each layer's own mask, text dense where it is in the same layer."""
    net = NETS[name]()
    monkeypatch.setattr(tile_attention, "kernel_for", lambda device, tokens: kernel)
    found = answer(sparse(net, 1, 2))
    monkeypatch.setattr(
        tile_attention, "attend", lambda q, k, v, f, chosen, text, **_: loops(q, k, v, f, chosen, text)
    )
    torch.testing.assert_close(found, answer(net), rtol=0, atol=1e-5)
    assert (found - answer(sparse(net, 2, 1))).abs().max() > 1e-4


@each
def test_p1_watching_a_dense_network_changes_nothing(name):
    """The processors' own form of dense attention, which the search runs, is diffusers'."""
    net, seen = NETS[name](), []
    dense, control = answer(net), attach(net)
    with control.watching(lambda layer, q, k, v, text, out: seen.append((layer, text, out.shape))):
        found = answer(net)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-5)
    text = 5 if name == "cogvideox" else 0
    assert seen == [(n, text, (2, text + FRAMES * 4, 2, 12)) for n in (0, 1)]


def test_p1_frames_that_share_no_tile_do_not_see_each_other():
    """One layer: of frames 1 and 2, which are not global, the one is not moved by the other."""
    net, other = sparse(wan(num_layers=1), 1), X.clone()
    other[:, :, 2] += 1
    gap = (answer(net) - answer(net, other)).abs().amax((0, 1, 3, 4))
    assert gap[1] == 0 and gap[3:].max() == 0 and min(gap[0], gap[2]) > 1e-4
    dense = wan(num_layers=1)
    assert (answer(dense) - answer(dense, other)).abs().amax((0, 1, 3, 4)).min() > 1e-5


def test_masks_of_other_frames_and_other_networks_are_refused():
    net = sparse(wan(), 1, 1)
    with pytest.raises(ValueError, match="masks of 6 latent frames, and a clip of 5"):
        answer(net, X[:, :, :5])
    with pytest.raises(ValueError, match="Linear is none of Wan"):
        attach(torch.nn.Linear(2, 2))
    fused = wan()
    fused.blocks[0].attn1.fuse_projections()
    with pytest.raises(ValueError, match="separate projections"):
        attach(fused)


def test_masks_are_of_an_adapter():
    """The student's masks act with its adapter; teacher and another adapter on the same network are dense."""
    backbone = Backbone(wan(), Wan(), Flow(), "flow")
    t, cond = torch.full((2,), 0.6, dtype=torch.float64), {"encoder_hidden_states": TEXT}
    for name in ("student", "previous"):
        backbone.add_adapter(name, 2, 2.0, Wan.lora_targets)
    with torch.no_grad():
        dense = backbone(X, t, cond)
        backbone.in_tiles("student").plan("student").copy_(torch.tensor([FRAMES, 1, 1]))
        for name in (None, "previous", "student"):
            with backbone.using(name):  # new adapters add nothing
                assert torch.equal(backbone(X, t, cond), dense) == (name != "student"), name
        assert torch.equal(backbone(X, t, cond), dense)
    assert backbone.state()["tiles/student"].tolist() == [FRAMES, 1, 1]
    again = copy.deepcopy(backbone)
    again.in_tiles("student").plan("student").zero_()
    assert backbone.state()["tiles/student"].tolist() == [FRAMES, 1, 1]
    with torch.no_grad(), again.using("student"):
        assert torch.equal(again(X, t, cond), dense)


def test_networks_without_tiles_are_refused_with_the_reason(tiny):
    from fastgen.networks.load import load_teacher

    network = load_teacher(str(tiny("sd"))).network
    with pytest.raises(UserError, match="UNet2DConditionModel, whose attention has no tiles here") as found:
        network.in_tiles(None)
    assert found.value.key == "objective.name" and layers_of(network.net) == {}


# -- files ---------------------------------------------------------------------------------------------------
def test_masks_go_through_their_file(tmp_path):
    net = sparse(wan(), 1, 3)
    control = attach(net)
    (tmp_path / "tile_masks.json").write_text(json.dumps(document(control.names, control.plan())))
    again = wan()
    load_tiles(again, tmp_path)
    assert torch.equal(answer(again), answer(net)) and attach(again).plan().tolist() == [FRAMES, 1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "no tile masks of format 1"),
        ({"layers": {"blocks.0.attn1": 1}}, "masks of 1 layers, and a network of other 2"),
        ({"frames": 2}, "numbers of global frames that are none"),
        ({"frames": "6"}, "numbers of global frames that are none"),
    ],
)
def test_damaged_masks_are_refused(change, message):
    names = ["blocks.0.attn1", "blocks.1.attn1"]
    said = document(names, torch.tensor([6, 1, 3]))
    assert parse(said, names).tolist() == [6, 1, 3]
    with pytest.raises(ValueError, match=message):
        parse({**said, **change}, names)
