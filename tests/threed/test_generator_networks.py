"""The networks that make assets, one for each kind of field: shapes, prompts, gradients, export and runs."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import VP
from fastgen.export.assets import made_assets, read_info
from fastgen.threed.fields import FieldAsset
from fastgen.threed.generator_networks import make_generator
from fastgen.threed.generators import PLAIN, TEXT, GeneratedAssets, fields_of
from fastgen.threed.student import AssetStudent
from tests.support.heavier import first_of
from tests.support.scenes import SIZE, seen_from
from tests.threed.test_generators import VALUES as GRID
from tests.threed.test_generators import run

KINDS = ["hash", "triplane", "grid"]
SIDE, WIDTH, LONG = 8, 5, 3
SHAPES = {
    "grid": (4, SIDE, SIDE, SIDE),
    "hash": (32 * 16 + 4 * 32,),
    "triplane": (3, 16, SIDE, SIDE),
}


def generator(kind, seed=0):
    return make_generator({"kind": kind, "size": SIDE, "generator": {"width": 4}}, WIDTH, seed)


def texts(num=4, seed=2):
    return torch.randn(num, LONG, WIDTH, generator=torch.Generator().manual_seed(seed))


def student(kind):
    S = VP.scaled_linear()
    net = GeneratedAssets(generator(kind), lambda images: images, S, SIZE, surface=True, samples=16)
    return net, torch.tensor(S.steps(1)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_p1_shapes_and_seeds(kind):
    net, text = generator(kind), texts()
    made = net(text)
    assert made.shape == (4, *SHAPES[kind]) and made.dtype == torch.float32
    p = 2 * torch.rand(4, 50, 3, generator=torch.Generator().manual_seed(3)) - 1
    assert net.read(made, p).shape == (4, 50, 4)
    assert torch.equal(made, generator(kind)(text)) and not torch.equal(made, generator(kind, 1)(text))


@pytest.mark.parametrize("kind", KINDS)
def test_p1_each_prompt_has_its_own_asset(kind):
    """Permuted prompts give permuted values; words matter, and masked ones do not."""
    net, text = generator(kind), texts()
    order = torch.tensor([2, 0, 3, 1])
    made = net(text)
    torch.testing.assert_close(net(text[order]), made[order], rtol=1e-4, atol=1e-5)
    assert (made[0] - made[1]).abs().max() > 1e-3, "the negative: another prompt"
    mask = torch.tensor([[1, 1, 0]] * 4)
    masked = net(text, mask)
    torch.testing.assert_close(masked, net(text[:, :2]), rtol=1e-4, atol=1e-5)
    changed = text.clone()
    changed[:, 2] += 1
    torch.testing.assert_close(net(changed, mask), masked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(changed), made, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_p1_gradients_are_those_of_single_assets_and_reach_every_weight(kind):
    """The loss of one view pulls what was made for its prompt as it does a field of its own, no other."""
    net, t = student(kind)
    batch, text = seen_from(3, 0), texts(3)
    made = net.generator(text).detach().requires_grad_(True)
    net.generator.forward = lambda *_: made
    batch.cond[PLAIN + TEXT] = text
    weight = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    x = net(batch.noise, t.expand(3), batch.cond)
    (weight * x)[1].sum().backward()
    assert made.grad[0].abs().max() == 0 and made.grad[2].abs().max() == 0
    alone = fields_of(net.generator, made.detach(), True, 16)[1]
    single = AssetStudent([alone], lambda images: images, net.schedule, SIZE)
    own = single(batch.noise[1:2], t.expand(1), {"camera": batch.cond["camera"][1:2]})
    torch.testing.assert_close(own, x[1:2], rtol=1e-4, atol=1e-4)
    (weight[1:2] * own).sum().backward()
    field = alone.field
    wanted = {
        "grid": lambda: field.table.grad[0] / 4,
        "triplane": lambda: field.planes.grad,
        "hash": lambda: torch.cat([field.net[i].weight.grad.flatten() for i in (0, 2)]),
    }[kind]()
    torch.testing.assert_close(made.grad[1], wanted, rtol=1e-3, atol=1e-4)
    del net.generator.forward
    (weight * net(batch.noise, t.expand(3), batch.cond)).sum().backward()
    missing = [n for n, p in net.generator.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not missing


@pytest.mark.parametrize("kind", KINDS)
def test_p1_what_is_made_renders_as_the_student_does(kind):
    net, t = student(kind)
    text, batch = texts(2), seen_from(2, 0)
    batch.cond[PLAIN + TEXT] = text
    x = net(batch.noise, t.expand(2), batch.cond)
    for i, one in enumerate(net.made({TEXT: text})):
        assert isinstance(one, FieldAsset) and one.kind == kind
        alone = AssetStudent([one], net.encode, net.schedule, SIZE)
        own = alone(batch.noise[i : i + 1], t.expand(1), {"camera": batch.cond["camera"][i : i + 1]})
        torch.testing.assert_close(own, x[i : i + 1], rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(batch.noise, t.expand(2), batch.cond), x, rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:2])
def test_two_prompts_learn_their_own_colours(kind):
    """Fitted to two balls of other colours; with the prompts swapped each shows the other's."""
    net, t = student(kind)
    batch, text = seen_from(4, 0), texts(2)
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9], [0.9, 0.1, 0.1], [0.1, 0.2, 0.9]])
    optimizer = torch.optim.Adam(net.generator.parameters(), 5e-3)

    def middles(rows):
        batch.cond[PLAIN + TEXT] = text[torch.tensor(rows)]
        x = net(batch.noise, t.expand(4), batch.cond)
        return (x[:, :, 10:14, 10:14].mean((2, 3)) + 1) / 2

    for _ in range(60):
        loss = (middles([0, 1, 0, 1]) - colours).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right, swapped = ((middles(r) - colours).abs().mean() for r in ([0, 1, 0, 1], [1, 0, 1, 0]))
    assert right < 0.1 and swapped > 0.3, (right, swapped)


@pytest.mark.parametrize("kind", first_of(KINDS[:2], 0))
def test_a_run_is_exported_and_resumed_bit_for_bit(tiny, tmp_path, kind):
    student = {"asset": {**GRID["student"]["asset"], "kind": kind}}
    assert run(tiny, tmp_path / "a", student=student) == 0
    folder = tmp_path / "a" / "export"
    info, weights = read_info(folder), load_file(folder / "generator.safetensors")
    assert info.generates and info.settings["kind"] == kind
    width = 32  # of the tiny teacher's text encoder
    made = made_assets(folder, info, {TEXT: torch.randn(2, 3, width)})
    assert [one.kind for one in made] == [kind] * 2
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "checkpoint-4")
    assert run(tiny, tmp_path / "b", "--resume", student=student) == 0
    again = load_file(tmp_path / "b" / "export" / "generator.safetensors")
    assert all(torch.equal(weights[k], again[k]) for k in weights)


def test_weights_of_another_kind_are_refused(tmp_path):
    from fastgen.threed.files import read_weights, write_weights

    write_weights(generator("hash"), tmp_path / "generator.safetensors")
    with pytest.raises(UserError, match="export it again"):
        read_weights(generator("triplane"), tmp_path / "generator.safetensors")
