"""Peaks of memory, each of a process of its own: three networks as adapters over one base beside one adapter
being trained, that adapter with activations kept or recomputed in part or whole, and a cycle of DMD2 with its
GAN above the networks it has built.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.page import ROOT
from benchmarks.timing import peak_bytes

LARGE_NET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [256, 512],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "transformer_layers_per_block": 2,
}
LARGE = {
    "net": LARGE_NET,
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
}


RECOMPUTED = {"none": False, "selective": "selective", "full": True}
"""settings of train.gradient_checkpointing, by the name of the policy"""


def child(mode: str) -> None:
    """Print what a process of its own measures: "one", "three", a policy of recomputation or "cycle"."""
    print(json.dumps(cycle() if mode == "cycle" else adapters(mode)))


def adapters(mode: str) -> dict:
    """Peak resident megabytes above the libraries' own, and CPU seconds of a step, of one LoRA being trained
    (one; none, selective and full at a larger batch) or DMD2 with three roles (three).
    """
    import torch
    from accelerate import Accelerator

    from fastgen.config.run import validate
    from fastgen.data.loader import Data
    from fastgen.training.assembly import make_cast, make_trainer

    torch.set_num_threads(2)
    lora = {"rank": 16, "lora_alpha": 16}
    dmd2 = {"name": "dmd2", "gan_weight": 0.0, "student_every": 1}
    objective = dmd2 if mode == "three" else {"name": "sft"}
    batch = 24 if mode in RECOMPUTED else 4
    cfg = validate(
        {
            "teacher": {"path": "", "blueprint": LARGE},
            "student": {"kind": "lora", "lora": lora},
            "critic": {"kind": "lora", "lora": lora},
            "objective": objective,
            "data": {"name": "fashion"},
            "train": {
                "train_batch_size": batch,
                "gradient_checkpointing": RECOMPUTED.get(mode, False),
                "max_train_steps": 3,
                "validation_steps": 0,
                "checkpointing_steps": 0,
                "ema_decay": [],
            },
        }
    )
    base = psutil.Process().memory_info().rss
    cast = make_cast(cfg)
    cond = {"encoder_hidden_states": torch.randn(4, 16, 768)}
    rows = Data(
        torch.randn(64, 4, 16, 16),
        cond,
        torch.arange(64) % 4,
        {k: v[:1] for k, v in cond.items()},
        (4, 16, 16),
    )
    trainer = make_trainer(cfg, cast, rows, Path(tempfile.mkdtemp()), Accelerator(cpu=True))
    trainer.total = 10**9  # no final checkpoint in the measured window
    trainer._begin(cfg.all_stages()[0])
    spent = []
    for k, window in zip(range(3), rows.batches(batch, 0, 1, trainer.rng, "cpu")):
        before = time.process_time()
        trainer._micro_step(window[0], k, 0, 3)
        spent.append(time.process_time() - before)
    parameters = sum(p.numel() for n, p in cast.teacher.backbone.named_parameters() if "lora_" not in n)
    megabytes = (peak_bytes() - base) / 2**20
    return {"megabytes": megabytes, "base_parameters": parameters, "cpu_seconds": min(spent)}


def cycle(batch: int = 128) -> dict:
    """Peak resident megabytes of DMD2's turns with the GAN on its critic's features, above the networks, the
    optimizers' states and the data, on the common network of `python -m benchmarks methods`.
    """
    import torch

    from benchmarks.methods import common_network, settings
    from benchmarks.timing import ready_trainer

    torch.set_num_threads(2)
    teacher = common_network(Path(tempfile.mkdtemp()) / "teacher")
    trainer, windows = ready_trainer(settings("dmd2", teacher, batch))
    turns = trainer.objective.cfg.student_every
    base = psutil.Process().memory_info().rss
    for k in range(turns):
        trainer._micro_step(next(windows)[0], k, 0, 10_000)
    states = sum(
        value.numel() * value.element_size()
        for optimizer in trainer.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return {"megabytes": (peak_bytes() - base - states) / 2**20, "batch": batch}


def memory() -> dict:
    """Peak of teacher + student + critic over one base, against one adapter on that base; DMD2's cycle."""
    found = {}
    for mode in ("one", "three", *RECOMPUTED, "cycle"):
        out = subprocess.run(
            [sys.executable, "-m", "benchmarks", "memory", "--child", mode],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert out.returncode == 0, out.stderr
        found[mode] = json.loads(out.stdout.strip().splitlines()[-1])
    ratio = found["three"]["megabytes"] / found["one"]["megabytes"]
    return {
        "ratio": ratio,
        "one_adapter_trained_mb": found["one"]["megabytes"],
        "teacher_student_critic_mb": found["three"]["megabytes"],
        "base_parameters": found["one"]["base_parameters"],
        "recomputed_mb": {mode: found[mode]["megabytes"] for mode in RECOMPUTED},
        "recomputed_seconds_over_none": {
            mode: found[mode]["cpu_seconds"] / found["none"]["cpu_seconds"] for mode in RECOMPUTED
        },
        "dmd2_cycle_mb": found["cycle"]["megabytes"],
        "dmd2_cycle_batch": found["cycle"]["batch"],
    }
