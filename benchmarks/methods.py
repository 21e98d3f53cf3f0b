"""Seconds per training step of every method on one common network, beside the raw passes it is made of.

One cycle of each method (as many steps as critic updates per student update) is recorded: every outermost
call of a network or a discriminator with its inputs, and every optimizer step. Replaying the list with none
of the framework around it gives the raw seconds; both are timed in turn. A method's own arithmetic, gradient
clipping, EMA and logging are what the ratio shows beyond 1.
"""

import functools
import statistics
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from fastgen.backbones.attention import exact_attention
from fastgen.critics import Discriminator
from fastgen.roles import Role

COMMON = {
    "teacher": {"path": "assets:teachers/fashion"},
    "data": {"name": "fashion", "limit": 64},
    "train": {"max_train_steps": 10_000, "validation_steps": 0, "checkpointing_steps": 0},
}
PAST_WARM_UP = 20_000
"""the step count from which the timing starts, so that every term is in force"""
CALLS = ((Role, "__call__"), (Role, "raw"), (Role, "features"), (Discriminator, "forward"))


@dataclass
class Call:
    """One pass: who, which method, on what, under whose turn, and how it is differentiated."""

    who: object
    method: object
    args: tuple
    kwargs: dict
    player: str | None
    kind: str  # "plain", "grad" or "tangent"


def settings(name: str, batch: int) -> dict:
    """A method's own config on the common network, as a full copy that no pipeline has to serve."""
    from fastgen.paths import config as config_file

    own = yaml.safe_load(config_file(f"objectives/{name}.yaml").read_text())
    asked = own.get("student", {})
    sampler = "renoise" if asked.get("sampler", "renoise") == "renoise" else "ode"
    steps = asked.get("num_steps", 1) if name != "tdm" else 4
    guided = {"guidance": 1.5} if "guidance" in own.get("teacher", {}) else {}
    return {
        **COMMON,
        "teacher": {**COMMON["teacher"], **guided},
        "student": {"kind": "full", "num_steps": steps, "sampler": sampler},
        "objective": {**own["objective"], "name": name},
        "train": {**COMMON["train"], "train_batch_size": batch},
    }


def _wrapped(x) -> bool:
    """Whether forward-mode AD carries this tensor."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _bare(x):
    """A copy of an input to call with later: a leaf that asks for gradient where the input did. Of what
    forward-mode AD carries only the shape can be had; ones are as dear as any numbers.
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


def _moving(objective) -> str | None:
    """The player whose turn it is, also where a method wraps another."""
    for name, player in objective.players.items():
        if any(p.requires_grad for p in player.trainable().values()):
            return name
    return None


@contextmanager
def recording(objective):
    """The list that every outermost network call is added to while the block lasts."""
    found, inside, kept = [], [], {}

    def watch(cls, name):
        original = kept[cls, name] = getattr(cls, name)

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            if not inside:
                kind = "grad" if torch.is_grad_enabled() else "plain"
                kind = "tangent" if any(map(_wrapped, args)) else kind
                given = tuple(_bare(a) for a in args), {n: _bare(v) for n, v in kwargs.items()}
                found.append(Call(self, original, *given, _moving(objective), kind))
            inside.append(1)
            try:
                return original(self, *args, **kwargs)
            finally:
                inside.pop()

        setattr(cls, name, call)

    for cls, name in CALLS:
        watch(cls, name)
    try:
        yield found
    finally:
        for (cls, name), original in kept.items():
            setattr(cls, name, original)


def replay(calls: list, objective, optimizers: dict) -> None:
    """The same passes, backwards and optimizer steps by hand."""
    for call in calls:
        if isinstance(call, str):  # the end of a turn
            optimizers[call].step()
            optimizers[call].zero_grad()
            continue
        for player in objective.players.values():
            player.requires_grad_(player.name == call.player)
        if call.kind == "tangent":
            x, t, cond = map(_made, call.args)
            with torch.no_grad(), exact_attention():
                f = lambda x, t: call.method(call.who, x, t, cond, **call.kwargs)  # noqa: E731, B023
                torch.func.jvp(f, (x, t), (torch.ones_like(x), torch.ones_like(t)))
        elif call.kind == "plain":
            with torch.no_grad():
                call.method(call.who, *call.args, **call.kwargs)
        else:
            outs = list(_outputs(call.method(call.who, *call.args, **call.kwargs)))
            if any(o.requires_grad for o in outs):
                sum(o.sum() for o in outs if o.requires_grad).backward()


def _outputs(out):
    if isinstance(out, Tensor):
        yield out
    elif out is not None:
        for part in out:
            yield from _outputs(part)


def one_method(name: str, rounds: int, batch: int) -> dict:
    """Median seconds of a step, of its raw passes, their ratio, and the passes of one cycle."""
    from accelerate import Accelerator

    from fastgen import config
    from fastgen.build import Cast
    from fastgen.data import load_data
    from fastgen.trainer import Trainer

    cfg = config.validate(settings(name, batch))
    cast = Cast(cfg)
    data = load_data(cfg.data, cast.teacher)
    trainer = Trainer(cfg, cast, data, Path(tempfile.mkdtemp()), Accelerator(cpu=True))
    stage = cfg.all_stages()[0]
    trainer._begin(stage)
    objective = trainer.objective
    objective.prepare()
    windows = data.batches(batch, 0, 1, trainer.rng, trainer.acc.device)
    host = getattr(stage.objective, "host", stage.objective)
    cycle, step = getattr(host, "student_every", 1), [PAST_WARM_UP]
    update = Trainer._update

    def framework(calls: list | None = None) -> None:
        if calls is not None:
            trainer._update = lambda player, k, total: (
                calls.append(player),
                update(trainer, player, k, total),
            )
        for _ in range(cycle):
            k, step[0] = step[0], step[0] + 1
            trainer._micro_step(next(windows)[0], k, 0, 10_000)
            trainer.ema.update(cast.parts["student"].trainable(), trainer.step)
            trainer.step += 1
        trainer.__dict__.pop("_update", None)

    for _ in range(len(data) // batch + 1):  # whatever the first steps alone do, such as solving for pairs
        framework()
    with recording(objective) as calls:
        framework(calls)
    raw = lambda: replay(calls, objective, trainer.optimizers)  # noqa: E731
    times = {framework: [], raw: []}
    for _ in range(rounds + 1):
        for run, kept in times.items():
            start = time.perf_counter()
            run()
            kept.append((time.perf_counter() - start) / cycle)
    ours, theirs = (kept[1:] for kept in times.values())  # the first round warms up
    passes = Counter(c.kind for c in calls if isinstance(c, Call))
    return {
        "seconds_per_step": round(statistics.median(ours), 4),
        "raw_seconds": round(statistics.median(theirs), 4),
        "overhead": round(statistics.median(a / b for a, b in zip(ours, theirs)), 4),
        "steps_in_a_cycle": cycle,
        "passes_in_a_cycle": dict(passes),
    }


def methods(rounds: int = 6, batch: int = 16, only: str = "") -> dict:
    """Every registered method in turn, two threads, wall clock: let the machine be idle."""
    from fastgen.backbones import load_teacher
    from fastgen.objectives import REGISTRY

    torch.set_num_threads(2)
    net = load_teacher(COMMON["teacher"]["path"]).backbone
    names = [n for n in sorted(REGISTRY) if not only or n in only.split(",")]
    found = {}
    for name in names:
        found[name] = one_method(name, rounds, batch)
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
