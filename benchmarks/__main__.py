"""Benchmarks, each a ratio of two things timed side by side in one run.

  python -m benchmarks overhead   a DMD2 training step over the raw passes and optimizer steps it needs
  python -m benchmarks memory     teacher + student + critic as adapters over one adapter being trained,
    >= 100M parameters; a cycle of DMD2 with its GAN above its networks
  python -m benchmarks sampling   seconds per image of teacher and student over their ratio of network calls
  python -m benchmarks methods    seconds per step of every method on one network, over its raw passes
  python -m benchmarks jvp        a continuous-time consistency step over a plain forward and backward pass
  python -m benchmarks channels   seconds of a pass with convolutions channels-last over the usual order
  python -m benchmarks startup    seconds to `import fastgen` and to `train.py --help`
  python -m benchmarks frechet    a FID of 50,000 images with its interval: seconds and memory
  python -m benchmarks sqrtm      the distance of two Gaussians against scipy's matrix root
  python -m benchmarks fd         10,000 one-step images of a mini and their fd_mini: seconds and memory
  python -m benchmarks prompts    CPU seconds and peak memory of loading 100,000 prompts
  python -m benchmarks data       a folder of 200,000 pictures: first step, memory, wait for a batch
  python -m benchmarks checkpoints  seconds that a checkpoint holds training up, at once and beside it, over
    those of writing its tensors alone
  python -m benchmarks loading    memory of two processes that get ready, with whole networks and with parts
  python -m benchmarks scale      overhead, memory, checkpoints, data and sampling, one after the other
  python -m benchmarks tiles      attention in tiles of frames over the dense one on a CPU
  python -m benchmarks rendering  seconds of a render and its backward pass, splats and fields; --write puts
    them into docs/methods.md
  python -m benchmarks faults     bad inputs, damaged checkpoints, kills and signals: tried and held, written
    to docs/reliability.md
  python -m benchmarks mutations  one-line mistakes put into every method: how many its own tests catch;
    --only NAME,NAME tries those of some methods, --quick leaves out the trainings

  python -m benchmarks real_size  models of published size with random weights: seconds of a step over its
    raw passes, peak memory over the computed one; --only NAME,NAME
  python -m benchmarks gpu        everything that needs a card, in eight minutes; --tiny ends on a CPU too

Add --write to keep the result in assets/results/benchmarks/<name>.json with the command that made it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.channels import channels  # noqa: F401  (called by name)
from benchmarks.data import data, table  # noqa: F401  (called by name)
from benchmarks.faults import faults
from benchmarks.frechet import frechet, sqrtm  # noqa: F401  (called by name)
from benchmarks.gpu import gpu
from benchmarks.jvp import jvp  # noqa: F401  (called by name)
from benchmarks.loading import loading  # noqa: F401  (called by name)
from benchmarks.memory import child, memory
from benchmarks.methods import methods  # noqa: F401  (called by name)
from benchmarks.mutations import mutated
from benchmarks.page import put
from benchmarks.prompts import prompts  # noqa: F401  (called by name)
from benchmarks.real_size import real_size
from benchmarks.rendering import rendering, rendering_table  # noqa: F401  (called by name)
from benchmarks.sampling_fd import fd  # noqa: F401  (called by name)
from benchmarks.scale import checkpoints, scale
from benchmarks.tiles import PAGE as TILES_PAGE
from benchmarks.tiles import table as tiles_table
from benchmarks.tiles import tiles  # noqa: F401  (called by name)
from benchmarks.timing import alternate, ready_trainer

ROOT = Path(__file__).resolve().parents[1]


OVERHEAD = {
    "teacher": {"path": "assets:teachers/fashion"},
    "data": {"name": "fashion", "limit": 500},
    "objective": {"name": "dmd2", "student_every": 2, "gan_weight": 0.0},
    "train": {
        "train_batch_size": 32,
        "max_train_steps": 10_000,
        "validation_steps": 0,
        "checkpointing_steps": 0,
    },
}


def overhead(rounds: int = 12) -> dict:
    """Trainer step against the same network calls, backwards and optimizer steps by hand, alternating."""
    import torch

    from fastgen.diffusion import losses

    torch.set_num_threads(1)
    trainer, windows = ready_trainer(OVERHEAD)
    stage, cast = trainer.cast.stages[0], trainer.cast
    student, critic, teacher = (cast.parts[n] for n in ("student", "critic", "teacher"))
    x0 = torch.randn(32, 4, 16, 16)
    t, cond = torch.full((32,), 0.5, dtype=torch.float64), {"class_labels": torch.arange(32) % 10}

    class Quiet:
        def update(self, n): ...
        def set_postfix(self, values): ...

    def framework() -> None:
        for k in range(2):  # one cycle: a student and critic step, then a critic step
            trainer._micro_step(next(windows)[0], k, 0, 10_000)
            trainer.ema.update(trainer.objective.learned("student"), trainer.step)
            trainer.step += 1
            trainer._log(stage, k, Quiet())

    def raw() -> None:
        for role, name in ((student, "student"), (critic, "critic"), (critic, "critic")):
            parameters, optimizer = list(role.trainable().values()), trainer.optimizers[name]
            for p in parameters:
                p.requires_grad_(True)
            losses.mse(role(x0, t, cond), x0).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            teacher(x0, t, cond), critic(x0, t, cond), student(x0, t, cond)

    times = alternate({"framework": framework, "raw": raw}, rounds)
    return {
        "ratio": statistics.median(a / b for a, b in zip(times["framework"], times["raw"])),
        "framework_seconds": statistics.median(times["framework"]),
        "raw_seconds": statistics.median(times["raw"]),
        "rounds": rounds,
        "clock": "process time, one thread",
    }


def sampling(rounds: int = 5, num: int = 50) -> dict:
    """Speed-up of one step over twenty teacher steps, as a share of the ratio of network calls."""
    import torch

    from fastgen.networks.load import load_teacher
    from fastgen.roles.roles import Role, Student
    from fastgen.sampling.solvers import sample_student, sample_teacher

    torch.set_num_threads(1)
    found = load_teacher("assets:teachers/fashion")
    role, student = Role(found.backbone), Student(found.backbone, None, found.schedule.steps(1))
    cond, null = found.codec.labels(torch.arange(num) % 10), found.codec.null(num)
    noise = torch.randn(num, *found.codec.shape)
    runs = {
        "teacher": lambda: sample_teacher(role, noise, cond, null, 20),
        "student": lambda: sample_student(student, list(range(num)), found.codec.shape, cond),
    }
    runs = {n: lambda draw=draw: found.codec.decode(draw()) for n, draw in runs.items()}
    teacher, quick = (statistics.median(seconds) / num for seconds in alternate(runs, rounds).values())
    return {
        "speedup": teacher / quick,
        "nfe_ratio": 20,
        "share_of_nfe_ratio": teacher / quick / 20,
        "teacher_seconds_per_image": teacher,
        "student_seconds_per_image": quick,
    }


def startup(rounds: int = 5) -> dict:
    """Wall seconds, medians, each against a bare interpreter in the same run."""
    commands = {
        "bare": ["-c", ""],
        "import_torch": ["-c", "import torch"],
        "import_fastgen": ["-c", "import fastgen"],
        "help": ["train.py", "--help"],
    }
    times = {n: [] for n in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            start = time.monotonic()
            subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
            times[name].append(time.monotonic() - start)
    return {f"{n}_seconds": statistics.median(v) for n, v in times.items()}


NAMES = (
    "overhead",
    "memory",
    "sampling",
    "jvp",
    "methods",
    "channels",
    "startup",
    "prompts",
    "data",
    "checkpoints",
    "loading",
    "scale",
    "tiles",
    "rendering",
    "faults",
    "mutations",
    "frechet",
    "sqrtm",
    "fd",
    "real_size",
    "gpu",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--write", action="store_true", help="keep the result in assets/results/benchmarks")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--every", type=int, default=1, help="faults: try every n-th attack only")
    parser.add_argument("--only", default="", help="mutations, real_size: these, with commas between")
    parser.add_argument("--quick", action="store_true", help="mutations: without the tests that train")
    parser.add_argument("--tiny", action="store_true", help="gpu, real_size: tiny networks, on a CPU")
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    if args.name == "mutations":
        result = mutated(args.only, args.quick, args.write)
    elif args.name == "real_size":
        result = real_size(tuple(filter(None, args.only.split(","))), args.tiny)
    elif args.name == "gpu":
        result = gpu(args.tiny)
    elif args.name == "scale":
        result = scale({one.__name__: one for one in (overhead, memory, checkpoints, data, sampling)})
    else:
        result = faults(args.every) if args.name == "faults" else globals()[args.name]()
    record = {
        "command": f"python -m benchmarks {args.name}" + " --tiny" * args.tiny,
        **{k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()},
    }
    print(json.dumps(record, indent=2))
    if args.write:
        folder = ROOT / "assets/results" / ("gpu" if args.name == "gpu" else "benchmarks")
        path = folder / f"{args.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        if args.name == "data":
            put("bench", table(record), ROOT / "docs/data.md")
        if args.name == "rendering":
            put("rendering", rendering_table(record), TILES_PAGE)
        if args.name == "tiles":
            put("tiles", tiles_table(record), TILES_PAGE)


if __name__ == "__main__":
    main()
