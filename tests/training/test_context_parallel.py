"""Samples that two processes compute together give the weights of one process that computes them alone."""

import pytest
import yaml

from fastgen.cli.train import main
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.networks.context_parallel import ring_size
from fastgen.networks.load import load_teacher
from tests.support.clips import clip_teacher
from tests.support.heavier import first_of
from tests.training.test_two_process import assert_same, launch_two, state

DRIVER = """
import sys, torch
from torch.nn.functional import scaled_dot_product_attention as whole
from fastgen.cli.train import main
heads = set()
def attend(query, *args, **kwargs):
    heads.add(query.shape[1])
    return whole(query, *args, **kwargs)
torch.nn.functional.scaled_dot_product_attention = attend
code = main(sys.argv[1:])
assert {1, 2} <= heads, heads  # of the two heads of self-attention each process has one
sys.exit(code)
"""
RING = """
import sys
from diffusers.models.attention_dispatch import TemplatedRingAttention as Ring
from fastgen.cli.train import main
forward, calls = Ring.forward, []
Ring.forward = staticmethod(lambda *given: (calls.append(1), forward(*given))[1])
code = main(sys.argv[1:])
assert calls
sys.exit(code)
"""
EPS = {"lr": 1e-3, "eps": 1e-4}  # Adam divides a gradient by its size: see test_two_process.py
KINDS = {"full": {"kind": "full"}, "lora": {"kind": "lora", "lora": {"rank": 2}}}


def settings(teacher, kind: str, batch: int, train: dict) -> dict:
    return {
        "teacher": {"path": str(teacher), "num_steps": 2, "guidance": 1.5},
        "student": {**KINDS[kind], "num_steps": 2},
        "critic": KINDS[kind],
        "objective": {"name": "dmd2", "student_every": 2, "gan_weight": 0.0},
        "optim": {"student": EPS, "critic": EPS},
        "data": {"name": "moving", "limit": 16},
        "train": {
            "max_train_steps": 4,
            "train_batch_size": batch,
            "validation_steps": 4,
            "ema_decay": [0.9],
            **train,
        },
        "eval": {"num_samples": 0, "validation_samples": 0, "grid": 2, "batch_size": 2},
    }


def compare(tmp_path, kind: str, processes: int, together: int = 2, heads: int = 2, **sharding) -> None:
    teacher = clip_teacher(tmp_path / "teacher", heads=heads)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(settings(teacher, kind, 4, {})))
    batch = 4 * together // processes
    split = settings(teacher, kind, batch, {"context_parallel": together, **sharding})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(split))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 0
    launch_two(tmp_path, RING if heads < together else DRIVER, processes=processes)
    one, two = state(tmp_path / "one", 4), state(tmp_path / "two", 4)
    assert any(key.startswith("part/critic") for key in one)
    assert_same(one, two, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", first_of(KINDS))
def test_two_processes_with_half_the_tokens_equal_one(kind, tmp_path):
    compare(tmp_path, kind, 2)


@pytest.mark.slow
def test_two_groups_have_samples_of_their_own(tmp_path):
    compare(tmp_path, "full", 4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "heads"), [(2, 1), (4, 2)])
def test_keys_go_around_a_ring_where_heads_are_too_few(processes, heads, tmp_path):
    """One head on two processes; two heads on four, which pass on keys and exchange heads."""
    compare(tmp_path, "full", processes, processes, heads)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "group"), [("full", None), ("full", 2), ("lora", None)])
def test_groups_share_networks_that_are_spread_over_all(kind, group, tmp_path):
    """Two samples of two processes each, over four parts, or over two copies of two parts."""
    compare(tmp_path, kind, 4, sharding="fsdp", shard_group=group)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"objective": {"name": "scm"}}, "objective.tangent: not with train.context_parallel"),
        ({"objective": {"gan_weight": 0.1}}, "train.context_parallel: dmd2 has disc beside its networks"),
    ],
)
def test_what_cannot_be_split_is_refused(change, message):
    base = settings("assets:teachers/moving-wan", "full", 4, {"context_parallel": 2})
    for section, values in change.items():
        base[section] = {**base[section], **values} if "name" not in values else values
    with pytest.raises(UserError, match=message):
        validate(base)


def test_a_network_that_diffusers_has_no_plan_of_is_refused():
    with pytest.raises(UserError, match="train.context_parallel: diffusers has no plan of UNet2DModel"):
        ring_size([load_teacher("assets:teachers/digits").backbone], 2)


@pytest.mark.parametrize(("degree", "ring"), [(2, 1), (4, 2), (8, 4), (3, 3)])
def test_as_many_go_around_as_have_no_heads_to_exchange(degree, ring, tmp_path):
    """Of two heads."""
    assert ring_size([load_teacher(str(clip_teacher(tmp_path))).backbone], degree) == ring


def test_one_process_splits_nothing(tmp_path, capsys):
    run = settings(clip_teacher(tmp_path / "teacher"), "full", 4, {"context_parallel": 2})
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(run))
    assert main(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")]) == 2
    assert "train.context_parallel: found 2 for 1 process;" in capsys.readouterr().err
