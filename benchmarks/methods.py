"""Seconds per training step of every method on one common network, beside the raw passes it is made of.

One cycle of each method (as many steps as critic updates per student update) is recorded: every outermost
call of a network or a discriminator with its inputs, and every optimizer step. Replaying the list with none
of the framework around it gives the raw seconds; both are timed in turn. A method's own arithmetic, gradient
clipping, EMA and logging are what the ratio shows beyond 1.
"""

import functools
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.timing import alternate, ready_trainer
from fastgen.core.paths import asset
from fastgen.core.paths import config as config_file
from fastgen.networks.attention import exact_attention
from fastgen.roles.heads import Discriminator
from fastgen.roles.roles import Role
from fastgen.training.trainer import Trainer

WIDTHS = (32, 80, 112)
"""channels of the common network's three levels; the bundled teacher has 32, 64, 96"""
COMMON = {
    "data": {"name": "fashion", "limit": 64},
    "train": {"max_train_steps": 10_000, "validation_steps": 0, "checkpointing_steps": 0},
}
PAST_WARM_UP = 20_000
"""the step count from which the timing starts, so that every term is in force"""
CALLS = ((Role, "__call__"), (Role, "raw"), (Role, "features"), (Discriminator, "forward"))


@dataclass
class Call:
    """One pass: who, which method, on what, and how it is differentiated."""

    who: object
    method: object
    args: tuple
    kwargs: dict
    kind: str  # "plain", "grad" or "tangent"


def common_network(folder: Path) -> str:
    """The Fashion-MNIST teacher's pipeline around a network of WIDTHS, not trained; path of its folder."""
    from diffusers import UNet2DModel

    shutil.copytree(asset("teachers/fashion"), folder)
    shape = UNet2DModel.load_config(folder / "unet")
    UNet2DModel.from_config({**shape, "block_out_channels": WIDTHS}).save_pretrained(folder / "unet")
    return str(folder)


def settings(name: str, teacher: str, batch: int) -> dict:
    """A method's own config on the common network, as a full copy, for no pipeline to sample."""
    own = yaml.safe_load(config_file(f"objectives/{name}.yaml").read_text())
    student = own.get("student", {})
    sampler = "renoise" if student.get("sampler", "renoise") == "renoise" else "ode"
    steps = student.get("num_steps", 1) if name != "tdm" else 4
    guided = {"guidance": 1.5} if "guidance" in own.get("teacher", {}) else {}
    return {
        **COMMON,
        "teacher": {"path": teacher, **guided},
        "student": {"kind": "full", "num_steps": steps, "sampler": sampler},
        "objective": {**own["objective"], "name": name},
        "train": {**COMMON["train"], "train_batch_size": batch},
    }


def _wrapped(x) -> bool:
    """Whether forward-mode AD carries this tensor."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _bare(x):
    """A copy of an input to call with later: a leaf that requires a gradient where the input did. Of what
    forward-mode AD carries only the shape is kept; its values do not change the cost.
    """
    if isinstance(x, dict):
        return {n: _bare(v) for n, v in x.items()}
    if _wrapped(x):
        return functools.partial(torch.full, x.shape, 0.5, dtype=x.dtype)
    if not isinstance(x, Tensor):
        return x
    copy = x.detach().clone()
    return copy.requires_grad_() if x.requires_grad else copy


def _made(x):
    """The tensors of `_bare`'s shapes."""
    if isinstance(x, dict):
        return {n: _made(v) for n, v in x.items()}
    return x() if isinstance(x, functools.partial) else x


@contextmanager
def recording():
    """The turns taken while the block lasts: (player, the outermost network calls that led to its update)."""
    turns, calls, inside, kept = [], [], [], {(Trainer, "_update"): Trainer._update}

    def watch(cls, name):
        original = kept[cls, name] = getattr(cls, name)

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            if not inside:
                kind = "grad" if torch.is_grad_enabled() else "plain"
                kind = "tangent" if any(map(_wrapped, args)) else kind
                given = tuple(_bare(a) for a in args), {n: _bare(v) for n, v in kwargs.items()}
                calls.append(Call(self, original, *given, kind))
            inside.append(1)
            try:
                return original(self, *args, **kwargs)
            finally:
                inside.pop()

        setattr(cls, name, call)

    def update(trainer, player, *args):
        turns.append((player, calls.copy()))
        calls.clear()
        kept[Trainer, "_update"](trainer, player, *args)

    Trainer._update = update
    for cls, name in CALLS:
        watch(cls, name)
    try:
        yield turns
    finally:
        for (cls, name), original in kept.items():
            setattr(cls, name, original)


def replay(turns: list, objective, optimizers: dict, around: Callable[[], Any] = nullcontext) -> None:
    """The same passes, backwards and optimizer steps by hand; the passes of each turn inside `around()`."""
    for name, calls in turns:
        for player in objective.players.values():
            player.requires_grad_(player.name == name)
        with around():
            for call in calls:
                _pass(call)
        optimizers[name].step()
        optimizers[name].zero_grad()


def _pass(call: Call) -> None:
    """One network call, with its backward where it had one."""
    if call.kind == "tangent":
        x, t, cond = map(_made, call.args)
        f = lambda x, t: call.method(call.who, x, t, cond, **call.kwargs)  # noqa: E731
        with torch.no_grad(), exact_attention():
            torch.func.jvp(f, (x, t), (torch.ones_like(x), torch.ones_like(t)))
        return
    with torch.set_grad_enabled(call.kind == "grad"):
        outs = [o for o in _outputs(call.method(call.who, *call.args, **call.kwargs)) if o.requires_grad]
    if outs:
        sum(o.sum() for o in outs).backward()


def _outputs(out):
    if isinstance(out, Tensor):
        yield out
    elif out is not None:
        for part in out:
            yield from _outputs(part)


def one_method(name: str, teacher: str, rounds: int, batch: int) -> dict:
    """Median seconds of a step, of its raw passes, their ratio, and the passes of one cycle."""
    trainer, windows = ready_trainer(settings(name, teacher, batch))
    objective = trainer.objective
    cycle = getattr(getattr(objective.cfg, "host", objective.cfg), "student_every", 1)
    trainer.step = PAST_WARM_UP

    def framework() -> None:
        for _ in range(cycle):
            trainer._micro_step(next(windows)[0], trainer.step, 0, 10_000)
            trainer.ema.update(objective.learned("student"), trainer.step)
            trainer.step += 1

    for _ in range(len(trainer.data) // batch + 1):  # whatever comes once, such as solving for pairs
        framework()
    with recording() as turns:
        framework()
    runs = {"ours": framework, "raw": lambda: replay(turns, objective, trainer.optimizers)}
    times = alternate(runs, rounds, time.perf_counter)
    ours, raw = ([seconds / cycle for seconds in found] for found in times.values())
    passes = Counter(call.kind for _, calls in turns for call in calls)
    return {
        "seconds_per_step": round(statistics.median(ours), 4),
        "raw_seconds": round(statistics.median(raw), 4),
        "overhead": round(statistics.median(a / b for a, b in zip(ours, raw)), 4),
        "steps_in_a_cycle": cycle,
        "passes_in_a_cycle": dict(passes),
    }


def methods(rounds: int = 6, batch: int = 16) -> dict:
    """Every registered method in turn, two threads, wall clock: let the machine be idle."""
    from fastgen.networks.load import load_teacher
    from fastgen.objectives import REGISTRY

    torch.set_num_threads(2)
    teacher = common_network(Path(tempfile.mkdtemp()) / "teacher")
    net = load_teacher(teacher).backbone
    found = {}
    for name in sorted(REGISTRY):
        found[name] = one_method(name, teacher, rounds, batch)
        print(f"{name:<22} {found[name]}", flush=True)
    return {
        "methods": found,
        "worst_overhead": max(v["overhead"] for v in found.values()),
        "parameters": sum(p.numel() for p in net.parameters()),
        "batch": batch,
        "threads": 2,
        "rounds": rounds,
        "clock": "wall",
    }
