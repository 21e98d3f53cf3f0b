"""teacher.offload in a cast: the same training, nothing trained is away, and what it is worth."""

from pathlib import Path

import pytest
import torch

from fastgen.cli.train import main
from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.networks import offload
from fastgen.training import memory
from fastgen.training.preparing import offload_frozen, trained
from tests.families.test_less_memory import Poisoned
from tests.objectives.test_contract import make
from tests.support.play import batch, play

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["dmd2", "consistency"])
def test_a_method_learns_the_same(name, kind, tiny, monkeypatch):
    """Bit for bit, with adapters over one base and with copies; also pictures are decoded so."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    monkeypatch.setattr(offload, "Visitor", Poisoned)
    found = []
    for away in (False, True):
        _, cast, objective = make(name, tiny("sd"), kind, gradient_checkpointing=True)
        if away:
            offload_frozen(cast.backbones(), cast.teacher.codec.vae, cast.parts, "cpu")
            assert cast.teacher.network.net.conv_out.weight.isnan().all()
        losses = [play(objective, batch(cast), k) for k in range(2)]
        learned = {n: p.clone() for n, p in cast.parts["student"].trainable().items()}
        found.append((losses, learned, cast.teacher.codec.decode(batch(cast).x0)))
    (losses, learned, pictures), (same_losses, same, again) = found
    assert losses == same_losses and torch.equal(pictures, again) and pictures.isfinite().all()
    for key, value in learned.items():
        assert torch.equal(value, same[key]), key


def test_what_is_trained_stays(tiny):
    _, cast, _ = make("dmd2", tiny("sd"), "lora")
    kept = trained(cast.parts)
    assert len(kept) == sum(len(cast.parts[n].trainable()) for n in ("student", "critic")) > 0
    layers = offload.layers_to_offload(cast.teacher.backbone, kept)
    assert not kept & {id(p) for _, weights in layers for p in weights}
    first = next(cast.teacher.backbone.parameters())  # by which diffusers says where a network is
    assert all(p is not first for _, weights in layers for p in weights)


def test_tied_weights_stay(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(4)))
    net[3].weight = net[1].weight
    assert [layer for layer, _ in offload.layers_to_offload(net, set())] == [net[2]]


def test_the_estimate_counts_one_layer_at_a_time():
    values = read_files([str(ROOT / "configs/teachers/sd15.yaml")])
    values |= {"objective": {"name": "dmd2", "gan_weight": 0.0}, "data": {"prompts": "any"}}
    sizes = []
    for away in (True, False):
        cfg = validate({**values, "teacher": {**values["teacher"], "offload": away}})
        sizes.append(next(iter(memory.estimate(memory.make_cast(cfg, "meta"), cfg.train).rows.values())))
    assert 0.15 * sizes[1] < sizes[0] < 0.3 * sizes[1]


@pytest.mark.parametrize(
    "given,named",
    [
        (("--teacher.quantization", "int8", "--student.kind", "lora"), "teacher.quantization"),
        (("--train.compile", "true"), "train.compile"),
        (("--train.compile_blocks", "true"), "train.compile_blocks"),
        (("--train.sharding", "fsdp", "--train.channels_last", "false"), "train.sharding"),
    ],
)
def test_what_it_does_not_go_with(given, named, capsys):
    argv = ["--config", str(ROOT / "configs/recipes/quickstart.yaml"), "--teacher.offload", "true", *given]
    assert main([*argv, "--dry_run"]) == 2
    printed = capsys.readouterr().err
    assert f"{named}: not with teacher.offload" in printed and printed.count("\n") == 1


def test_where_the_cpu_computes_it_says_so(tiny, capsys, monkeypatch):
    cfg, *_ = make("sft", tiny("flow"))
    values = cfg.model_dump(mode="json")
    memory.make_cast(validate({**values, "teacher": {**values["teacher"], "offload": True}}))
    assert "teacher.offload: no effect" in capsys.readouterr().err
