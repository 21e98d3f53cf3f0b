"""Validation during a run, and what follows it: the final table, results.json, export and report."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.ema import swapped
from fastgen.core.files import write_tensors, write_text
from fastgen.evaluation.evaluator import Evaluator, measure, table, teacher_card
from fastgen.evaluation.grids import save_grid


def averaged(trainer):
    """Context in which the student holds its first EMA (nothing happens without one)."""
    decays = trainer.ema.decays
    return swapped(trainer.student.trainable(), trainer.ema.averages[decays[0]]) if decays else nullcontext()


class Validator:
    """Called at step 0 and every validation_steps: a grid from fixed seeds, and the cheap metric."""

    def __init__(self, cfg, cast, data, folder: Path):
        self.cfg, self.folder, self.evaluator = cfg, folder, Evaluator(cfg, cast, data)

    def __call__(self, trainer) -> None:
        if trainer.acc.is_main_process:
            self._validate(trainer)
        trainer.acc.wait_for_everyone()

    def _validate(self, trainer) -> None:
        cfg, evaluator = self.cfg.eval, self.evaluator
        teacher_grid = self.folder / "samples" / "teacher.png"
        if evaluator.few_step and not teacher_grid.exists():
            save_grid(evaluator.images("teacher", cfg.grid, cfg.seed), teacher_grid)
        with averaged(trainer):
            save_grid(
                evaluator.images("student", cfg.grid, cfg.seed),
                self.folder / "samples" / f"step_{trainer.step:06d}.png",
            )
            scores = {}
            if cfg.validation_samples:
                num = max(cfg.grid, cfg.validation_samples)
                scores = evaluator.score(evaluator.images("student", num, cfg.seed + 1_000_000))
            trainer.write_metrics({"step": trainer.step, **{f"validation/{k}": v for k, v in scores.items()}})
            primary = scores.get(evaluator.measurer.primary) if evaluator.measurer else None
            if primary is not None and primary < trainer.best.get("score", float("inf")):
                trainer.best = {"score": primary, "step": trainer.step}
                if cfg.keep == "best" and trainer.step:
                    write_tensors(self.folder / "best.safetensors", trainer.student.trainable())


def finish(trainer, evaluator: Evaluator) -> dict:
    """Measure, export, report; prints one short table and where everything is."""
    from fastgen.evaluation.diagnostics import warnings
    from fastgen.evaluation.report import read_metrics, write_report
    from fastgen.export.load import fuse, sample_command
    from fastgen.training.exporting import export_run

    folder, cfg = trainer.folder, trainer.cfg
    kept = folder / "best.safetensors"
    best = cfg.eval.keep == "best" and kept.exists()
    if best:
        _load_best(trainer, kept)
    if cfg.student.fuse:
        weight = 0.5 if cfg.student.fuse_weight is None else cfg.student.fuse_weight
        fuse(_kept(trainer), cfg.student.fuse, weight)

    def show(who: str, steps: int, images: Tensor) -> None:
        """The first of the measured images, of all contenders and every step count asked for."""
        if steps in (0, *cfg.eval.student_steps):
            name = who.removesuffix("_student") + (f"_{steps}_steps" if steps else "")
            save_grid(images[: cfg.eval.grid], folder / "samples" / f"{name}.png")

    metrics = read_metrics(folder / "metrics.jsonl")
    with averaged(trainer):
        results = measure(cfg, evaluator, show)
        decay = f"EMA {trainer.ema.decays[0]:g}" if trainer.ema.decays else "raw"
        results["protocol"]["weights"] = f"{decay}, step {trainer.best['step'] if best else trainer.step}"
        results["curve"] = _curve(metrics, evaluator)
        results["train"] = {"seconds": trainer.seconds, "steps": trainer.step, "peak_rss_mb": peak_rss_mb()}
        write_text(folder / "results.json", json.dumps(results, indent=2))
        exported = None
        if not trainer.cast.teacher.is_analytic:
            exported = export_run(trainer, folder / "export", results)
    if exported is not None and not evaluator.few_step:
        write_text(exported / "card.json", json.dumps(teacher_card(results), indent=2))
    report = write_report(folder)
    print(table(results))
    for seen, cure in warnings(metrics, results):
        print(f"warning: {seen}; try {cure}")
    print(f"report  {report}")
    if exported is None:
        print("export  none: an analytic teacher's student is no diffusers network")
    else:
        print(f"export  {exported}\nsample  {sample_command(exported)}")
    return results


def _curve(metrics: list[dict], evaluator: Evaluator) -> dict[str, float]:
    """The cheap metric at each validation, by step."""
    key = f"validation/{evaluator.measurer.primary}" if evaluator.measurer else ""
    return {str(r["step"]): r[key] for r in metrics if key in r}


def peak_rss_mb() -> float:
    """Most memory this process has held."""
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _kept(trainer) -> dict[str, Tensor]:
    """The weights that are measured and exported: the first average, or the raw ones."""
    decays = trainer.ema.decays
    return trainer.ema.averages[decays[0]] if decays else trainer.student.trainable()


@torch.no_grad()
def _load_best(trainer, file: Path) -> None:
    from safetensors.torch import load_file

    best = load_file(file)
    for name, value in _kept(trainer).items():
        value.copy_(best[name])
