"""What train.channels_last saves: seconds of a pass, alone and with its backward, over those without it."""

import statistics

from benchmarks.timing import alternate

TEACHERS = ("fashion", "digits", "tinted-sd")


def channels(rounds: int = 9, batch: int = 32) -> dict:
    """CPU seconds of each bundled U-Net with its convolutions channels-last over those without, side by side;
    medians, one thread.
    """
    import torch

    from fastgen.networks.load import load_teacher

    torch.set_num_threads(1)
    found = {}
    for name in TEACHERS:
        runs = {}
        for order in ("first", "last"):
            teacher = load_teacher(f"assets:teachers/{name}")
            if order == "last":
                teacher.network.channels_last()
            pair = passes(teacher, batch)
            runs |= {(order, what): run for what, run in pair.items()}
        times = {of: statistics.median(seconds) for of, seconds in alternate(runs, rounds).items()}
        found[name] = {
            what: round(times["last", what] / times["first", what], 3) for what in ("forward", "both")
        }
    return {"of_usual_order": found, "batch": batch, "rounds": rounds, "clock": "process time, one thread"}


def passes(teacher, batch: int) -> dict:
    """A pass without gradients, and one with its backward, of the teacher's network."""
    import torch

    net = teacher.network
    x = torch.randn(batch, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((batch,), teacher.schedule.steps(1)[0], dtype=torch.float64)
    cond = teacher.codec.null(batch)

    def forward() -> None:
        with torch.no_grad():
            net(x, t, cond)

    def both() -> None:
        net(x, t, cond).square().mean().backward()

    return {"forward": forward, "both": both}
