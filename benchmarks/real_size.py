"""Models of published size with random weights: seconds of a training step over the raw passes it is made of,
and peak memory over what docs/memory.md is computed with.

Networks are built from the layouts of configs/teachers and filled in place, in the precision of the run:
nothing is downloaded and nothing is held twice. Each model is a process of its own, whose peak is its own.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "assets/results/benchmarks/real_size.json"
LORA = {"rank": 16, "lora_alpha": 16}


@dataclass(frozen=True)
class Size:
    """A model of configs/teachers: at what size a CPU trains it, and what makes it tiny."""

    reduced: dict[str, int]
    tiny: dict[str, Any] = field(default_factory=dict)


UNET = {"block_out_channels": [32, 32, 64], "cross_attention_dim": 32, "layers_per_block": 1}
MODELS = {
    "sd15": Size(
        {"height": 256, "width": 256},
        {
            **UNET,
            "block_out_channels": [32, 32, 64, 64],
            "attention_head_dim": 4,
        },
    ),
    "sdxl": Size(
        {"height": 256, "width": 256},
        {
            **UNET,
            "attention_head_dim": [2, 2, 4],
            "transformer_layers_per_block": [1, 1, 1],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
    ),
    "sana-0.6b": Size(
        {"height": 512, "width": 512},
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
        },
    ),
    "wan2.1-1.3b": Size(
        {"height": 128, "width": 128, "num_frames": 9},
        {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32},
    ),
    "flux1-dev": Size(
        {"height": 256, "width": 256},
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 6, 6],
        },
    ),
}
QUANTIZED = {"sdxl-int8": ("sdxl", "int8")}
"""models over a base in fewer bits, which needs torchao"""
TINY_SIZE = {"height": 64, "width": 64}


TRAINED = ("compile", "gradient_checkpointing")
"""what `settings` takes for `train`; the rest is for the teacher"""


def settings(name: str, method: str, tiny: bool, full: bool, **change: Any) -> dict:
    """The config of a run: LoRA student and critic over a frozen base in bf16, batch 1, checkpointed unless
    the change says otherwise.
    """
    train = {key: change.pop(key) for key in TRAINED if key in change}
    from fastgen.config.parse import read_files

    given = read_files([f"configs:teachers/{name}.yaml", f"configs:objectives/{method}.yaml"])
    size = {} if full and not tiny else TINY_SIZE if tiny else MODELS[name].reduced
    if "num_frames" in MODELS[name].reduced and not (full and not tiny):
        size = {**size, "num_frames": MODELS[name].reduced["num_frames"]}
    layout = given["teacher"].pop("layout")
    if tiny:
        layout = {**layout, "net": {**layout["net"], **MODELS[name].tiny}}
    blueprint = {"net": layout["net"], "scheduler": layout["scheduler"], "index": layout["index"]}
    base = {**given["teacher"], **size, "path": "", "dtype": "bf16", "blueprint": blueprint, **change}
    return {
        "teacher": base,
        "student": {"kind": "lora", "num_steps": 4, "lora": LORA},
        "critic": {"lora": LORA},
        "objective": {**given["objective"], **({"gan_weight": 0.0} if method == "dmd2" else {})},
        "data": {"name": "tinted"},
        "train": {
            "train_batch_size": 1,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            **train,
            "max_train_steps": 10_000,
            "validation_steps": 0,
            "checkpointing_steps": 0,
        },
    }


def random_teacher(cfg, device: str):
    """The teacher of a config with a blueprint, its weights drawn where they will stay."""
    from dataclasses import fields

    from fastgen.networks.load import TeacherOptions, load_teacher

    given = cfg.model_dump(include={f.name for f in fields(TeacherOptions)})
    teacher = load_teacher(**given, weights=False)
    net = teacher.backbone.net.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            spread = 0.02 if parameter.ndim > 1 else 0.0
            parameter.normal_(0 if spread else 1, max(spread, 1e-3), generator=generator)
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.normal_(generator=generator)
    return teacher


def random_data(teacher, num: int = 4):
    """x0 and conditions of the right shapes, drawn at random."""
    from fastgen.data.batches import Data

    generator = torch.Generator().manual_seed(1)

    def drawn(value: torch.Tensor, rows: int) -> torch.Tensor:
        shape = (rows, *value.shape[1:])
        return (
            torch.randn(shape, generator=generator) if value.is_floating_point() else torch.ones(shape).long()
        )

    table = {k: drawn(v, num) for k, v in teacher.codec._shapes(1).items()}
    null = {k: drawn(v, 1) for k, v in table.items()}
    x0 = torch.randn(num, *teacher.codec.shape, generator=generator)
    return Data(x0, table, torch.arange(num), null, teacher.codec.shape, [f"prompt {i}" for i in range(num)])


def prepared(values: dict, device: str):
    """(trainer before its first step, its windows of batches) of a config over random weights."""
    from accelerate import Accelerator

    from fastgen.config.run import validate
    from fastgen.training.assembly import make_trainer
    from fastgen.training.cast import Cast

    class RandomCast(Cast):
        def _load(self, null):
            return random_teacher(self.teacher_cfg, "cpu" if self.teacher_cfg.quantization else self.place)

    cfg = validate(values)
    cast = RandomCast(cfg.teacher, cfg.student, cfg.critic, cfg.train, cfg.all_stages(), device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=cfg.train.mixed_precision)
    trainer = make_trainer(cfg, cast, random_data(cast.teacher), Path(tempfile.mkdtemp()), accelerator)
    trainer._begin(cfg.all_stages()[0])
    trainer.objective.prepare()
    return trainer, trainer.data.batches(1, 0, 1, trainer.rng, trainer.acc.device)


def measured(values: dict, device: str, rounds: int, before: int = 0) -> dict[str, Any]:
    """Seconds of one cycle of student and critic steps, of its raw passes, and the peak of memory in this
    process beyond `before` bytes.
    """
    from benchmarks.methods import recording, replay
    from fastgen.training.memory import estimate

    trainer, windows = prepared(values, device)
    if device == "cpu" and values["teacher"].get("quantization"):
        forget_peak()  # of the weights before they were rounded, which a CPU holds and a card does not
    objective = trainer.objective
    cycle = getattr(objective.cfg, "student_every", 1)

    def framework() -> None:
        for _ in range(cycle):
            trainer._micro_step(next(windows)[0], trainer.step, 0, 10_000)
            trainer.ema.update(objective.learned("student"), trainer.step)
            trainer.step += 1
        wait(device)

    def raw() -> None:
        replay(turns, objective, trainer.optimizers, partial(torch.autocast, device, torch.bfloat16))
        wait(device)

    framework()
    held = peak(device)
    with recording() as turns:
        ours = [seconds(framework) / cycle]
    passes = [seconds(raw) / cycle]
    for _ in range(rounds - 1):
        ours.append(seconds(framework) / cycle)
        passes.append(seconds(raw) / cycle)
    computed = estimate(trainer.cast, trainer.train_cfg).total
    count = sum(p.numel() for n, p in trainer.cast.teacher.backbone.named_parameters() if "lora_" not in n)
    return {
        "parameters": count,
        "x0": list(trainer.cast.teacher.codec.shape),
        "seconds_per_step": round(statistics.median(ours), 3),
        "overhead": round(statistics.median(a / b for a, b in zip(ours, passes)), 3),
        "peak_gib": round((held - before) / 2**30, 3),
        "computed_gib": round(computed / 2**30, 3),
        "peak_over_computed": round((held - before) / computed, 3),
        "export_mib": round(exported(trainer) / 2**20, 2),
        "finite": all(bool(p.isfinite().all()) for p in trainer.student.trainable().values()),
    }


def exported(trainer) -> int:
    """Bytes of the adapter that the run's export holds."""
    from fastgen.training.exporting import export_run

    folder = export_run(trainer, Path(trainer.folder) / "export", {})
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> int:
    """Most bytes held so far, on the device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


def forget_peak() -> None:
    """Let the peak of this process begin at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(name: str, method: str = "dmd2", timeout: int = 1800, **options: Any) -> dict[str, Any]:
    """`measured` of a model in a process of its own; {"error": its last line} where that fails."""
    given = json.dumps({"name": name, "method": method, **options})
    command = [sys.executable, "-m", "benchmarks.real_size", given]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {timeout} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1] if lines else "no output"}


def real_size(only: tuple[str, ...] = (), tiny: bool = False, rounds: int = 1) -> dict:
    """Models of MODELS on this CPU at their reduced sizes, two steps of each before its memory is read. With
    `only` some, the others are those on record.
    """
    chosen = only or ("sd15", "sdxl", *QUANTIZED, "sana-0.6b", "wan2.1-1.3b")
    found: dict[str, dict] = {}
    if only and not tiny and RECORD.is_file():
        found = json.loads(RECORD.read_text())["models"]
    for name in chosen:
        model, kind = QUANTIZED.get(name, (name, None))
        options = {"quantization": kind} if kind else {}
        found[name] = in_a_process(model, tiny=tiny, rounds=rounds, **options)
        print(f"{name:<16} {found[name]}", flush=True)
    good = [row for row in found.values() if "error" not in row]
    return {
        "models": found,
        "worst_memory": max((abs(math.log(r["peak_over_computed"])) for r in good), default=math.nan),
        "threads": torch.get_num_threads(),
        "tiny": tiny,
    }


def main() -> int:
    """One model, as `in_a_process` starts it."""
    given = json.loads(sys.argv[1])
    name, method = given.pop("name"), given.pop("method")
    device, rounds = given.pop("device", "cpu"), given.pop("rounds", 2)
    tiny, full = given.pop("tiny", False), given.pop("full", False)
    measured(settings(name, method, True, False, **given), device, 1)  # what is imported and kept anyway
    values = settings(name, method, tiny, full, **given)
    if device == "cpu" and method == "dmd2":
        values["objective"]["student_every"] = 2  # a step of student and critic, and one of the critic alone
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    print(json.dumps(measured(values, device, rounds, 0 if device == "cuda" else peak(device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
