"""train.channels_last: other strides, the same run; files and exports do not show it."""

import shutil
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastgen.cli.train import main
from fastgen.config.run import validate
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.networks.load import load_teacher
from fastgen.training.assembly import make_cast
from tests.training.test_resume import losses

VALUES = {
    "teacher": {"path": "assets:teachers/digits"},
    "data": {"name": "digits", "limit": 16},
    "objective": {"name": "dmd2", "student_every": 2, "gan_weight": 0.1, "disc_weight": 0.1},
    "optim": {"student": {"fused": True}, "critic": {"fused": True}},
    "train": {
        "train_batch_size": 4,
        "max_train_steps": 3,
        "log_steps": 1,
        "checkpointing_steps": 2,
        "validation_steps": 0,
        "ema_decay": [0.5],
        "channels_last": True,
    },
    "eval": {"num_samples": 0, "validation_samples": 4, "grid": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(run with channels last, the same run without it)."""
    folder = tmp_path_factory.mktemp("channels")
    (folder / "run.yaml").write_text(yaml.safe_dump(VALUES))
    for name, given in (("last", "true"), ("first", "false")):
        argv = ["--config", str(folder / "run.yaml"), "--output_dir", str(folder / name)]
        assert main([*argv, "--train.channels_last", given]) == 0
    return folder / "last", folder / "first"


def test_every_network_has_its_convolutions_channels_last():
    cast = make_cast(validate(VALUES))
    for backbone in cast.backbones():
        found = [p for p in backbone.net.parameters() if p.ndim == 4 and min(p.shape) > 1]
        assert len(found) > 10
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in found)
        assert not any(p.is_contiguous() for p in found)


def test_losses_and_exports_are_those_of_the_usual_order(runs):
    for last, first in zip(*map(losses, runs), strict=True):
        assert last.keys() == first.keys() and len(last) > 5
        for key in (k for k in last if k.endswith("/loss")):
            assert last[key] == pytest.approx(first[key], rel=1e-3), key
    last, first = (load_file(next((run / "export/unet").glob("*.safetensors"))) for run in runs)
    assert last.keys() == first.keys()
    for name, value in last.items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=2e-4)


def test_a_resumed_run_is_bit_exact(runs):
    """Momentum is put in the order of the weights: kernels that update flat memory need both alike."""
    run = runs[0]
    whole = load_file(run / "checkpoints/checkpoint-3/state.safetensors")
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    assert main(["--config", str(run.parent / "run.yaml"), "--output_dir", str(run), "--resume"]) == 0
    resumed = load_file(run / "checkpoints/checkpoint-3/state.safetensors")
    assert whole.keys() == resumed.keys() and any("exp_avg" in k for k in whole)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def epsilon(net, x):
    return net(x, 300, class_labels=torch.tensor([1, 2])).sample


def test_exact_derivatives_work_in_either_order():
    """Forward-mode differentiation of convolutions and group norms over channels-last tensors."""
    x, along = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for last in (True, False):
        backbone = load_teacher("assets:teachers/fashion").network
        if last:
            backbone.channels_last()
        found.append(tangent(partial(epsilon, backbone.net), (x,), (along,), TangentConfig()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_it_is_refused_where_networks_are_spread():
    train = {**VALUES["train"], "sharding": "fsdp"}
    with pytest.raises(ValueError, match="train.channels_last: not with train.sharding fsdp"):
        validate({**VALUES, "train": train})
