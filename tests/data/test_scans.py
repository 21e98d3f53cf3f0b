"""Scans as training data: offsets, their matching, and a user's pairs."""

import numpy as np
import pytest
import torch

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.loader import load_data, look_at
from fastgen.data.scans import HELD_OUT, fitted, matched, sampled, simulated
from tests.support.clouds import tiny_teacher


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


def section(**data):
    return validate({"objective": {"name": "sft"}, "data": data}).data


def test_x0_leads_from_the_scan_to_the_truth(teacher):
    data = load_data(section(name="scenes", limit=4), teacher)
    (batch,) = next(data.batches(2, 0, 1, Rng(0), "cpu"))
    assert batch.x0.shape == batch.noise.shape == (2, *teacher.codec.shape)
    clouds = teacher.codec.shown(batch.x0, batch.cond)
    torch.testing.assert_close(clouds, data.truth[batch.index])
    assert torch.equal(batch.uncond["start"], batch.cond["start"])
    assert not batch.uncond["scan"].any() and batch.cond["scan"].any()


def test_held_out_scenes_are_others(teacher):
    train, held = (simulated(teacher.codec, split, 2) for split in ("train", "heldout"))
    assert not torch.equal(train.truth, held.truth) and train.again is None
    assert held.again.shape == held.truth.shape and not torch.equal(held.again, held.truth)
    assert len(simulated(teacher.codec, "heldout", HELD_OUT + 1)) == HELD_OUT


def test_the_first_of_them_are_whole(teacher):
    held = simulated(teacher.codec, "heldout", 3)
    some = held.first(2)
    assert len(some) == len(some.truth) == len(some.again) == len(some.x0) == 2 and len(held) == 3
    assert torch.equal(some.cond(torch.tensor([1]))["scan"], held.cond(torch.tensor([1]))["scan"])
    assert held.first(0) is held and held.first(3) is held


def test_matching_is_a_permutation_that_shortens_the_way():
    generator = torch.Generator().manual_seed(0)
    scan, truth = torch.randn(5, 3, generator=generator), torch.randn(20, 3, generator=generator)
    found = matched(scan, truth)
    assert torch.equal(found.sort(0).values, truth.sort(0).values)
    starts = scan.repeat_interleave(4, 0)
    assert (found - starts).norm(dim=1).mean() < 0.75 * (truth - starts).norm(dim=1).mean()


def test_matching_on_a_line_is_what_is_nearest():
    """Starts at 0 and 10 with two places each; truth at 1, 2, 3 and 9: 3 comes too late to 0."""
    line = lambda *x: torch.tensor([[v, 0.0, 0.0] for v in x])  # noqa: E731
    assert matched(line(0, 10), line(3, 9, 2, 1))[:, 0].sort().values.tolist() == [1, 2, 3, 9]
    found = matched(line(0, 10), line(3, 9, 2, 1))[:, 0].tolist()
    assert sorted(found[:2]) == [1, 2] and sorted(found[2:]) == [3, 9]


def test_vp_matches_and_local_does_not():
    local, vp = (
        load_data(section(name="scenes", limit=2), tiny_teacher(formulation=f)) for f in ("local", "vp")
    )
    assert torch.equal(local.truth, vp.truth)
    assert vp.x0.square().mean() < 0.5 * local.x0.square().mean()


def write_pairs(folder, num=2, points=40):
    for part in ("scan", "truth"):
        (folder / part).mkdir(parents=True)
        for i in range(num):
            cloud = np.random.default_rng(i).normal(size=(points, 3))
            np.save(folder / part / f"{i}.npy", cloud.astype("f4"))
    return folder


def test_a_users_pairs(teacher, tmp_path):
    data = load_data(section(scans=str(write_pairs(tmp_path / "own"))), teacher)
    assert len(data) == 2 and data.x0.shape[1:] == teacher.codec.shape
    known = np.load(tmp_path / "own/truth/1.npy")
    gaps = torch.cdist(data.truth[1], torch.from_numpy(known)).amin(1)
    assert gaps.max() < 1e-3, "every point is one of the file's"


def test_a_users_mistakes_are_one_line(teacher, tmp_path):
    folder = write_pairs(tmp_path / "own")
    np.save(folder / "scan/0.npy", np.zeros((3, 3)))
    few = section(scans=str(folder))
    with pytest.raises(UserError, match=r"data\.scans.*0\.npy holds 3 points, the model takes 12"):
        load_data(few, teacher)
    np.save(folder / "truth/0.npy", np.zeros((0, 3)))
    np.save(folder / "scan/0.npy", np.ones((20, 3)))
    with pytest.raises(UserError, match=r"truth/0\.npy holds no point"):
        load_data(few, teacher)
    (folder / "truth/0.npy").unlink()
    for look in (look_at, load_data):
        with pytest.raises(UserError, match="0 is in one of scan/ and truth/ alone"):
            look(few, teacher)
    for files in ("scan", "truth"):
        for file in (folder / files).iterdir():
            file.unlink()
    with pytest.raises(UserError, match="holds no point cloud"):
        look_at(few, teacher)
    with pytest.raises(UserError, match=r"data\.name.*'fashion'.*completes scans"):
        look_at(section(name="fashion"), teacher)


def test_many_points_are_thinned_and_few_come_again():
    scan = torch.randn(25_000, 3, generator=torch.Generator().manual_seed(0))
    assert fitted(scan, 50, "k", "f").shape == (50, 3)
    assert sampled(scan[:7], 20).unique(dim=0).shape == (7, 3) and sampled(scan, 20).shape == (20, 3)
