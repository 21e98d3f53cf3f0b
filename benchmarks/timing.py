"""What the benchmarks share: functions timed in turn, the peak of memory, a trainer before its first step."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def alternate(
    runs: dict[str, Callable], rounds: int, clock: Callable[[], float] = time.process_time, after=None
) -> dict[str, list[float]]:
    """Seconds of each function by name, called in turn; a first round warms up and is not recorded.

    `after` is called behind every call, outside the clock.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
            if after:
                after()
    return {name: seconds[1:] for name, seconds in times.items()}


def peak_bytes() -> int:
    """The most resident memory that this process has held (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def ready_trainer(values: dict):
    """(Trainer of a one-stage config with its parts, data and optimizers, its windows of batches)."""
    from accelerate import Accelerator

    from fastgen.config.run import validate
    from fastgen.data.loader import load_data
    from fastgen.training.assembly import make_cast, make_trainer

    cfg = validate(values)
    cast = make_cast(cfg)
    data = load_data(cfg.data, cast.teacher)
    trainer = make_trainer(cfg, cast, data, Path(tempfile.mkdtemp()), Accelerator(cpu=True))
    trainer._begin(cfg.all_stages()[0])
    trainer.objective.prepare()
    return trainer, data.batches(cfg.train.train_batch_size, 0, 1, trainer.rng, trainer.acc.device)
