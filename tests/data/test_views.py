"""Views of a prompt: new cameras every batch, by its number alone; the bundled renders of solids."""

import torch

from fastgen.core.rng import Rng
from fastgen.data.bundled import all_captions, attributes_of, load_images
from fastgen.data.solids import VOCABULARY, renders
from fastgen.data.views import POOL, Views, captions
from fastgen.threed.cameras import VIEWS, Cameras, Ranges


def views():
    table = {"encoder_hidden_states": torch.arange(4.0)[:, None, None].expand(4, 2, 3).clone()}
    plain = {"encoder_hidden_states": torch.full((1, 2, 3), 9.0)}
    null = {"encoder_hidden_states": torch.full((1, 2, 3), -1.0)}
    return Views(table, plain, null, (4, 8, 8), ["a red torus"], Ranges(elevation=(-10.0, 80.0)))


def taken(start, rank=0, world=1, num=3, seed=0):
    stream = views().batches(6, start, 1, Rng(seed, rank, world), "cpu")
    return [next(stream)[0] for _ in range(num)]


def test_every_batch_has_new_cameras_and_the_prompt_that_fits():
    first, second, third = taken(0)
    assert not torch.equal(first.cond["camera"], second.cond["camera"])
    for batch in (first, second, third):
        cameras = Cameras.of(batch.cond["camera"])
        names = cameras.names()
        assert batch.texts == [f"a red torus, {name} view" for name in names]
        rows = batch.cond["encoder_hidden_states"][:, 0, 0].long().tolist()
        assert [VIEWS[i] for i in rows] == names
        assert batch.x0 is None and (batch.uncond["encoder_hidden_states"] == -1).all()
        told = batch.critic_cond
        assert (told["encoder_hidden_states"] == 9).all() and set(told) == {"encoder_hidden_states", "c2w"}
        torch.testing.assert_close(told["c2w"], cameras.c2w.flatten(1))


def test_a_resumed_run_sees_what_it_would_have_seen_and_processes_differ():
    whole, rest = taken(0), taken(2)
    assert torch.equal(whole[2].cond["camera"], rest[0].cond["camera"])
    assert torch.equal(whole[2].noise, rest[0].noise)
    cameras = torch.cat([taken(0, rank, 2)[0].cond["camera"] for rank in (0, 1)])
    slot = ((cameras[:, 0] + 180) / 30).floor().long().tolist()
    assert slot == list(range(12)), "stratified over the batch of both"
    assert not torch.equal(whole[0].cond["camera"], taken(0, seed=1)[0].cond["camera"])


def test_requests_are_always_the_same_and_from_all_around():
    data = views()
    index = torch.arange(POOL)
    assert torch.equal(data.cond(index)["camera"], views().cond(index)["camera"])
    azimuth = data.pool.azimuth[:64]
    assert azimuth.std() > 80, "the first few are from all around too"
    assert data.first(5) is data and captions("a")[0] == "a, front view"


def test_captions_of_solids_name_what_is_shown():
    held = load_images("solids", "heldout")
    assert len(load_images("solids", "train")) == 4800 and len(held) == 960
    assert held.images.shape == (960, 3, 32, 32) and len(all_captions("solids")) == 240
    for i in (0, 100, 959):
        named = attributes_of(held.captions[i], "solids")
        assert named == {key: int(held.attributes[key][i]) for key in VOCABULARY}
    red = held.images[held.attributes["colour"] == 0].float()
    blue = held.images[held.attributes["colour"] == 4].float()
    strongest = [(x[:, 0] - x[:, 2]).flatten(1).amax(1).mean() for x in (red, blue)]
    assert strongest[0] > 100 > strongest[1]


def test_new_renders_are_of_the_same_kind_as_the_set():
    image = renders(0, 0, views().pool[:2], 32)
    assert image.shape == (2, 3, 32, 32) and image.dtype == torch.uint8
    assert torch.equal(image, renders(0, 0, views().pool[:2], 32))
    assert not torch.equal(image, renders(1, 0, views().pool[:2], 32))
