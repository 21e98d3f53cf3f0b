"""What growing costs: seconds that a checkpoint holds training up, and the benchmarks of scale together."""

import statistics
import time
from collections.abc import Callable

from benchmarks.timing import alternate, ready_trainer

RUN = {
    "teacher": {"path": "assets:teachers/fashion"},
    "data": {"name": "fashion", "limit": 64},
    "objective": {"name": "dmd2", "student_every": 2, "gan_weight": 0.0},
}
TRAIN = {"train_batch_size": 4, "max_train_steps": 1_000_000, "validation_steps": 0, "checkpointing_steps": 0}


def checkpoints(rounds: int = 7) -> dict:
    """Wall seconds of a checkpoint of DMD2 with optimizers and an average, written at once and beside the
    training, against the same tensors written by safetensors alone, in turn.
    """
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    made = {
        name: _trained({**RUN, "train": {**TRAIN, "async_checkpoints": behind}})
        for name, behind in (("at_once", False), ("beside", True))
    }
    tensors = _state(made["at_once"])
    bare = made["at_once"].folder / "bare.safetensors"

    def save(trainer) -> Callable[[], None]:
        def run() -> None:
            trainer.step += 1
            trainer.save(0, trainer.step)

        return run

    runs = {name: save(trainer) for name, trainer in made.items()}
    runs["bare"] = lambda: save_file(tensors, bare)
    held = alternate(runs, rounds, time.monotonic, after=lambda: made["beside"]._saved(wait=True))
    seconds = {name: statistics.median(found) for name, found in held.items()}
    return {
        "at_once_over_bare": seconds["at_once"] / seconds["bare"],
        "beside_over_bare": seconds["beside"] / seconds["bare"],
        "megabytes": sum(v.numel() * v.element_size() for v in tensors.values()) / 2**20,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "rounds": rounds,
        "clock": "wall time in which training waits; one thread",
    }


def _trained(values: dict):
    """A trainer after one step, which has made the optimizers' states."""
    trainer, windows = ready_trainer(values)
    trainer.total = 10**9
    trainer._micro_step(next(windows)[0], 0, 0, 10**6)
    return trainer


def _state(trainer) -> dict:
    """The tensors of its checkpoint."""
    from fastgen.training import checkpoint

    tensors = trainer._tensors()
    for name, optimizer in trainer.optimizers.items():
        keys = list(trainer.params[name])
        tensors = tensors | checkpoint.optimizer_tensors(optimizer, keys, f"optim/{name}")[0]
    return {name: value.detach().contiguous().clone() for name, value in tensors.items()}


def scale(parts: dict[str, Callable[[], dict]]) -> dict:
    """These benchmarks, one after the other."""
    found = {}
    for name, part in parts.items():
        print(f"{name} ...", flush=True)
        found[name] = part()
    return found
