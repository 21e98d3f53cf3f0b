"""A network that makes the asset of any prompt: its gradient is that of the single assets, its export is read
without fastgen, and a library is taken apart as it should be.
"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastgen.cli import export, sample
from fastgen.config.assets import ViewsConfig, expanded
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.views import Views
from fastgen.diffusion.schedules import VP
from fastgen.evaluation.metrics.agreement import library_of, prompt_recall
from fastgen.export.assets import made_assets, name_of, read_info
from fastgen.objectives.sds import SDS, SDSConfig
from fastgen.roles.roles import Student, StudentSpec
from fastgen.threed.cameras import Ranges
from fastgen.threed.fields import DenseGrid, FieldAsset
from fastgen.threed.generator_networks import Generator, GridGenerator
from fastgen.threed.generators import PLAIN, TEXT, GeneratedAssets
from fastgen.threed.student import AssetStudent
from fastgen.training import memory
from tests.support.heavier import first_of
from tests.support.plain import run_plain
from tests.support.plain_generators import LOADERS
from tests.support.scenes import SIZE, SceneTeacher, blobs, role, run_assets, seen_from
from tests.support.toys import rng

SIDE = 8


class Table(Generator):
    """In the place of the network a grid for each prompt, whose number is its text."""

    def __init__(self, num=3):
        super().__init__()
        self.grids = torch.nn.ModuleList(FieldAsset("grid", SIDE, seed=i) for i in range(num))

    def forward(self, text, mask=None):
        every = torch.cat([DenseGrid.UNIT * one.field.table for one in self.grids])
        return every[text[:, 0, 0].long()]


def student_of(generator, **more):
    S = VP.scaled_linear()
    return GeneratedAssets(generator, lambda images: images, S, SIZE, **more), torch.tensor(S.steps(1)[0])


def asked(which, k=0):
    """(noise, condition) of views of prompts by number."""
    batch = seen_from(len(which), k)
    return batch.noise, batch.cond | {PLAIN + TEXT: torch.tensor(which)[:, None, None].float()}


def test_p1_the_gradient_is_that_of_single_assets():
    """Of a table of grids: each row's part is what the asset alone gets; a swapped prompt's is not."""
    table, which = Table(), [0, 2, 2, 0]
    net, t = student_of(table)
    noise, cond = asked(which)
    times, weight = t.expand(4), torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    x = net(noise, times, cond)
    (weight * x).sum().backward()
    for i in (0, 2):
        rows = [row for row, one in enumerate(which) if one == i]
        alone = FieldAsset("grid", SIDE, seed=i)
        single = AssetStudent([alone], lambda images: images, net.schedule, SIZE)
        own = single(noise[rows], times[rows], {"camera": cond["camera"][rows]})
        torch.testing.assert_close(own, x[rows], rtol=1e-5, atol=1e-5)
        (weight[rows] * own).sum().backward()
        torch.testing.assert_close(
            table.grids[i].field.table.grad, alone.field.table.grad, rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(table.grids[2 - i].field.table.grad, alone.field.table.grad, atol=1e-2)
    assert table.grids[1].field.table.grad.abs().max() == 0, "nobody asked for it"


def test_p1_prompts_do_not_touch_each_other():
    """A permuted batch is the permuted images; each prompt alone gives the same asset; words matter."""
    net, t = student_of(GridGenerator(5, SIDE, 4), surface=True)
    text = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))
    noise, cond = asked([0, 1, 2, 3])
    cond[PLAIN + TEXT] = text
    order = torch.tensor([2, 0, 3, 1])
    x = net(noise, t.expand(4), cond)
    again = net(noise[order], t.expand(4), {k: v[order] for k, v in cond.items()})
    torch.testing.assert_close(again, x[order], rtol=1e-4, atol=1e-5)
    made = net.made({TEXT: text})
    alone = AssetStudent([made[1]], net.encode, net.schedule, SIZE)
    one = alone(noise[1:2], t.expand(1), {"camera": cond["camera"][1:2]})
    torch.testing.assert_close(one, x[1:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made[0].field.table, made[1].field.table, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(noise, t.expand(4), cond), x, rtol=0.05, atol=0.05)
    masked = net.generator(text, torch.tensor([[1, 1, 0]] * 4))
    torch.testing.assert_close(masked, net.generator(text[:, :2]))


@pytest.mark.slow
def test_p2_two_prompts_reach_their_own_scenes():
    """Exact teachers of two scenes; with the prompts swapped each shows the other's."""
    other = blobs()
    other.put("means", -other.value("means"))
    teacher = SceneTeacher(VP.scaled_linear(), [blobs(), other])
    net, t = student_of(GridGenerator(2, 16, 8), samples=32, background="white")
    net.behind = lambda z: torch.full((len(z), 3), 0.5)
    objective = SDS(
        SDSConfig(), {"student": Student(net, None, StudentSpec([float(t)])), "teacher": role(teacher)}, rng()
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, betas=(0.5, 0.99))

    def batch_at(k, swap=False):
        batch = seen_from(4, k)
        prompt = torch.tensor([0, 1, 1, 0])
        text = torch.nn.functional.one_hot(1 - prompt if swap else prompt, 2)[:, None].float()
        batch.cond |= {"prompt": prompt, PLAIN + TEXT: text}
        batch.uncond = batch.cond
        return batch

    for k in range(200):
        objective.rng.reset(k)
        loss, _ = next(objective.step(batch_at(k), k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def psnr(swap):
        batch = batch_at(10**6, swap)
        with torch.no_grad():
            x = net(batch.noise, t.expand(4), batch.cond)
        return float(-10 * ((x - teacher.images(batch.cond)).square().mean() / 4).log10())

    assert psnr(False) > 22 and psnr(False) > psnr(True) + 5, (psnr(False), psnr(True))


def test_prompts_in_braces_are_a_library():
    assert expanded("a {red,blue} {cube,big box}") == [
        "a red cube",
        "a red big box",
        "a blue cube",
        "a blue big box",
    ]
    assert expanded("a {red} cube") == ["a {red} cube"]
    views = ViewsConfig(prompt="a {red,blue} cube", held_out=("a red cube",))
    assert views.trained == ("a blue cube",) and views.library == ["a blue cube", "a red cube"]


def test_batches_are_of_different_prompts_and_never_of_those_held_out():
    num = 7
    rows = lambda first, count: {TEXT: torch.arange(first, first + count).float()[:, None, None]}  # noqa: E731
    names = [f"p{i}" for i in range(num)]
    null = {TEXT: -torch.ones(1, 1, 1)}
    data = Views(rows(0, 4 * num), rows(100, num), null, (4, 8, 8), names, Ranges(), held_out=2)
    stream, seen = data.batches(4, 0, 1, Rng(0), "cpu"), set()
    for _ in range(20):
        (batch,) = next(stream)
        which = (batch.cond[PLAIN + TEXT].flatten() - 100).long().tolist()
        assert len(set(which)) == 4 and max(which) < 5 and set(batch.cond) == {TEXT, PLAIN + TEXT, "camera"}
        assert [r // 4 for r in batch.cond[TEXT].flatten().long().tolist()] == which
        assert batch.views[TEXT].flatten().view(4, 4)[:, 0].tolist() == [4 * w for w in which]
        assert batch.critic_cond[TEXT].flatten().tolist() == [100 + w for w in which]
        assert [text.split(",")[0] for text in batch.texts] == [names[w] for w in which]
        seen |= set(which)
    assert seen == set(range(5))
    other = data.unseen()
    index = torch.arange(50)
    assert set(other.cond(index)[PLAIN + TEXT].flatten().tolist()) == {105.0, 106.0}
    assert torch.equal(other.null(index)[PLAIN + TEXT], other.cond(index)[PLAIN + TEXT])
    every = Views(rows(0, 28), rows(0, 7), null, (4, 8, 8), names, Ranges())
    both = [next(every.batches(3, 0, 1, Rng(0, rank, 2), "cpu")) for rank in (0, 1)]
    assert len({w for (b,) in both for w in b.cond[PLAIN + TEXT].flatten().tolist()}) == 6


def test_recall_is_over_the_whole_library():
    """Two of three images fit their own prompt best; a colour alone decides between two red things."""
    ids = lambda *rows: dict(zip(("shape", "colour", "view"), torch.tensor(rows).T))  # noqa: E731
    library = library_of(ids([0, 0, 0], [1, 0, 3]), ids([1, 1, 0]))
    assert sorted(zip(*(v.tolist() for v in library.values()))) == [(0, 0), (1, 0), (1, 1)]
    logits = {
        "shape": torch.tensor([[2.0, 0], [0, 2], [0, 2]]),
        "colour": torch.tensor([[0.0, 5], [1, 0], [1, 0]]),
    }
    wanted = {"shape": torch.tensor([0, 1, 1]), "colour": torch.tensor([0, 0, 1])}
    found = prompt_recall(logits, wanted, library)
    assert found == {"prompt_recall": pytest.approx(1 / 3)}, "the first looks blue: (1, 1) fits"
    sides = wanted | {"view": torch.tensor([0, 2, 2])}
    named = {"prompt_recall": 1 / 3, "prompt_recall_front": 0, "prompt_recall_back": 0.5}
    assert prompt_recall(logits, sides, library) == pytest.approx(named)
    assert prompt_recall({"shape": logits["shape"]}, wanted, {"shape": torch.tensor([0, 1])}) == {
        "prompt_recall": 1
    }


VALUES = {
    "student": {"asset": {"kind": "grid", "size": 8, "samples": 12, "generator": {"width": 4}}},
    "data": {"views": {"prompt": "a {red,blue} {bag,boot}", "held_out": ["a red boot"]}},
    "objective": {"name": "asd", "fall_steps": 4},
    "optim": {"student": {"lr": 1e-3}},
    "train": {"max_train_steps": 4, "train_batch_size": 3, "validation_steps": 0, "checkpointing_steps": 2},
    "eval": {"num_samples": 0, "grid": 4},
}


def run(tiny, folder, *more, **changes):
    return run_assets(tiny, folder, VALUES | changes, *more)


KINDS = {
    "grid": VALUES["student"]["asset"],
    "hash": {"kind": "hash", "size": 16, "samples": 12, "generator": {"width": 4}},
    "triplane": {"kind": "triplane", "size": 8, "samples": 12, "generator": {"width": 16}},
}


@pytest.mark.parametrize("kind", first_of(KINDS))
def test_p4_a_plain_loader_renders_what_sample_py_does(tiny, tmp_path, capsys, kind):
    """From the text encoder and the exported weights alone, within a grey level."""
    assert run(tiny, tmp_path / "a", student={"asset": KINDS[kind]}) == 0
    folder = tmp_path / "a" / "export"
    if kind == "hash":  # which begins grey on grey
        weights = load_file(folder / "generator.safetensors")
        save_file(
            weights | {"tables.tables": 50 * weights["tables.tables"]}, folder / "generator.safetensors"
        )
    info = read_info(folder)
    assert info.generates and info.held_out == ("a red boot",) and len(info.prompts) == 3
    page = (tmp_path / "a" / "report" / "index.html").read_text()
    assert "data:image/gif" in page and 'class="viewer"' in page and "any prompt" in page
    prompt, out = "a green boot", tmp_path / "views"
    flags = ["--prompt", prompt, "--camera", "0", "0", "2.2", "47.5", "--out", str(out)]
    assert sample.main(["--model", str(folder), *flags]) == 0
    (tmp_path / "load.py").write_text(LOADERS[kind])
    done = run_plain(tmp_path / "load.py", tiny("sd"), folder, tmp_path / "plain.png", prompt, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, plain = (
        np.asarray(Image.open(f)).astype(int) for f in (out / "00000_0.png", tmp_path / "plain.png")
    )
    assert np.abs(ours - plain).max() <= 1 and ours.std() > 5
    assert (out / f"{name_of(prompt)}.safetensors").is_file()
    (folder / "generator.safetensors").write_bytes((folder / "asset.json").read_bytes())
    capsys.readouterr()
    assert sample.main(["--model", str(folder), "--prompt", "a", "--out", str(tmp_path / "no")]) == 2
    assert "export it again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_its_checkpoints_are_exported(tiny, tmp_path):
    assert run(tiny, tmp_path / "a") == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "checkpoint-4")
    assert run(tiny, tmp_path / "b", "--resume") == 0
    one, two = (load_file(tmp_path / name / "export" / "generator.safetensors") for name in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)
    kept = tmp_path / "kept"
    assert export.main(["--run", str(tmp_path / "a"), "--checkpoint", "2", "--out", str(kept)]) == 0
    early = load_file(kept / "generator.safetensors")
    assert not all(torch.equal(one[k], early[k]) for k in one) and read_info(kept).training_steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sds", "vsd", "bsd", "uni_instruct_3d"])
def test_other_methods_train_it_unchanged(tiny, tmp_path, name):
    extra = {"critic": {"kind": "lora", "lora": {"rank": 2}}} if name in ("vsd", "uni_instruct_3d") else {}
    objective = {"name": name, **({"bank": 1, "bank_steps": 1} if name == "uni_instruct_3d" else {})}
    if name != "bsd":
        objective["asset"] = {"perp_neg": True}
    assert run(tiny, tmp_path / "a", objective=objective, **extra) == 0
    info, folder = read_info(tmp_path / "a" / "export"), tmp_path / "a" / "export"
    text = {TEXT: torch.randn(1, 4, load_file(folder / "generator.safetensors")["told.0.weight"].shape[1])}
    assert len(made_assets(folder, info, text)) == 1


@pytest.mark.parametrize(
    "changes,key",
    [
        ({"train": {"train_batch_size": 4}}, "found 3 prompts to train on for a batch of 4"),
        ({"student": {"asset": {"kind": "grid", "size": 8}}}, "data.views.prompt: found 4 prompts"),
        ({"student": {"asset": {"kind": "gaussians", "generator": {}}}}, "generator: found kind gaussians"),
        ({"student": {"asset": {"kind": "grid", "num": 2, "generator": {}}}}, "generator"),
        ({"student": {"asset": {"kind": "grid", "size": 24, "generator": {}}}}, "size: found 24"),
        ({"student": {"asset": {"kind": "triplane", "size": 9, "generator": {}}}}, "size: found 9"),
        ({"student": {"asset": {"kind": "grid", "generator": {"width": 0}}}}, "width"),
        ({"data": {"views": {"prompt": "a {red,blue} bag", "held_out": ["a green bag"]}}}, "held_out: found"),
        ({"data": {"views": {"prompt": "a bag", "held_out": ["a bag"]}}}, "held_out: found every prompt"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(tiny, changes, key):
    with pytest.raises(UserError, match=key):
        validate({"teacher": {"path": str(tiny("sd"))}, **VALUES, **changes})


def test_the_memory_of_a_generator_is_estimated(tiny):
    """Nearly all of it is at the finest grid, so twice the side keeps nearly eight times as much."""
    sizes = []
    for size in (16, 32):
        asset = {**VALUES["student"]["asset"], "size": size, "generator": {"width": 16}}
        cfg = validate({"teacher": {"path": str(tiny("sd"))}, **VALUES, "student": {"asset": asset}})
        sizes.append(list(memory.estimate(memory.make_cast(cfg, "meta"), cfg.train).rows.values())[-1])
    assert 6 < sizes[1] / sizes[0] < 8.5 and sizes[1] > 3 * 4 * 16 * 32**3
    plain = {**VALUES, "student": {"asset": {"kind": "grid"}}, "data": {"views": {"prompt": "a"}}}
    single = validate({"teacher": {"path": str(tiny("sd"))}, **plain})
    assert list(memory.estimate(memory.make_cast(single, "meta"), single.train).rows.values())[-1] == 0


def test_a_teacher_without_text_is_refused(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "a", teacher={"path": "assets:teachers/digits"}) == 2
    assert "student.asset.generator" in capsys.readouterr().err


def test_a_prompt_for_a_single_asset_is_refused(tiny, tmp_path, capsys):
    single = {
        "student": {"asset": {"kind": "grid", "size": 8, "samples": 4}},
        "data": {"views": {"prompt": "a bag"}},
    }
    assert run(tiny, tmp_path / "a", **single) == 0
    capsys.readouterr()
    assert (
        sample.main(["--model", str(tmp_path / "a"), "--prompt", "a boot", "--out", str(tmp_path / "o")]) == 2
    )
    assert "--prompt" in capsys.readouterr().err
