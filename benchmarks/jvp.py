"""What a derivative along the trajectory costs: a whole sCM step over one plain forward and backward pass."""

import statistics

from benchmarks.timing import alternate

SETTINGS = {
    "teacher": {"path": "assets:teachers/fashion"},
    "objective": {"name": "scm", "warmup_steps": 0},
    "data": {"name": "fashion"},
}


def jvp(rounds: int = 12, batch: int = 16) -> dict:
    """Ratios for the exact tangent and for differences, without and with a teacher's call, side by side."""
    import torch

    from fastgen.config.run import validate
    from fastgen.core.batch import Batch
    from fastgen.core.rng import Rng
    from fastgen.diffusion import losses
    from fastgen.training.assembly import make_cast

    torch.set_num_threads(1)
    cfg = validate(SETTINGS)
    cast = make_cast(cfg)
    x0, noise = torch.randn(2, batch, *cast.teacher.codec.shape)
    cond = {"class_labels": torch.arange(batch) % 10}
    one = Batch(x0, cond, cast.teacher.codec.null(batch), noise, torch.arange(batch))
    student, t = cast.parts["student"], torch.full((batch,), 0.5, dtype=torch.float64)
    objective = cast.stage(cfg.all_stages()[0], Rng(0))
    parameters = list(objective.players["student"].trainable().values())

    def scm(method: str, mode: str) -> None:
        tangent = objective.cfg.tangent.model_copy(update={"method": method})
        objective.cfg = objective.cfg.model_copy(update={"tangent": tangent, "mode": mode})
        for loss, _ in objective.step(one, 1):
            loss.backward()

    def plain() -> None:
        for p in student.trainable().values():
            p.requires_grad_(True)
        losses.mse(student(x0, t, cond), x0).backward()

    runs = {"plain": plain}
    for method in ("exact", "difference"):
        runs[method] = lambda m=method: scm(m, "training")
        runs[f"{method}_with_teacher"] = lambda m=method: scm(m, "distillation")

    def forget() -> None:
        for p in parameters:
            p.grad = None

    kept = alternate(runs, rounds, after=forget)
    ratios = {
        f"{n}_ratio": statistics.median(a / b for a, b in zip(found, kept["plain"]))
        for n, found in kept.items()
        if n != "plain"
    }
    return {
        **ratios,
        **{f"{n}_seconds": statistics.median(found) for n, found in kept.items()},
        "batch": batch,
        "parameters": sum(p.numel() for p in student.trainable().values()),
        "rounds": rounds,
        "clock": "process time, one thread",
    }
