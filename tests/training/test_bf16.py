"""Continuous-time methods under bf16 autocast: two thousand steps on a trained mini stay finite."""

import pytest
import torch
from accelerate import Accelerator

from fastgen.config.run import validate
from fastgen.data.loader import load_data
from fastgen.training.assembly import make_cast, make_trainer

OBJECTIVES = {
    "scm": {"name": "scm", "warmup_steps": 200, "weighting": "uniform"},
    "meanflow": {"name": "meanflow", "flow_ratio": 0.5},
}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_thousand_steps(tmp_path, name):
    cfg = validate(
        {
            "teacher": {"path": "assets:teachers/digits"},
            "objective": OBJECTIVES[name],
            "data": {"name": "digits"},
            "optim": {"student": {"lr": 3e-4, "warmup_steps": 20}},
            "train": {
                "max_train_steps": 2000,
                "train_batch_size": 8,
                "mixed_precision": "bf16",
                "checkpointing_steps": 0,
            },
        }
    )
    cast = make_cast(cfg)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    trainer = make_trainer(cfg, cast, load_data(cfg.data, cast.teacher), tmp_path, accelerator)
    trainer.fit()  # NotFinite would name the player, the term and the step
    assert trainer.step == 2000
    assert all(torch.isfinite(p).all() for p in cast.parts["student"].trainable().values())
