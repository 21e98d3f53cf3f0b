"""Validation during a run, and what follows it: export, the final table, results.json and report."""

import itertools
import math
import shutil
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fastgen.config.run import StageConfig
from fastgen.config.sections import EvalConfig
from fastgen.core import interrupt
from fastgen.core.ema import swapped
from fastgen.core.errors import NotFinite, UserError, first_line, warn
from fastgen.core.files import disk_error, write_json, write_tensors
from fastgen.core.reading import read_json
from fastgen.evaluation.evaluator import Evaluator, measure
from fastgen.evaluation.final_table import table, teacher_card
from fastgen.evaluation.label_free import against_teacher, looks
from fastgen.evaluation.sample_grids import save_grid, save_requests
from fastgen.evaluation.spread import Spread


def averaged(trainer):
    """Context in which the student holds its first EMA (nothing happens without one)."""
    decays = trainer.ema.decays
    return swapped(trainer.student.trainable(), trainer.ema.averages[decays[0]]) if decays else nullcontext()


class Validator:
    """Called at step 0, every validation_steps and where a stage ends, on every process: a grid from fixed
    seeds, and the cheap metric. All draw; the main process looks at what they have drawn.
    """

    def __init__(self, cfg: EvalConfig, evaluator: Evaluator, folder: Path):
        self.cfg, self.evaluator, self.folder = cfg, evaluator, folder
        self.better = evaluator.better()
        self.keep_by = choose_metric(cfg, self.better, evaluator.least())

    def __call__(self, trainer) -> None:
        """A signal cuts it short between two batches of samples; a resumed run validates this step again."""
        trainer.validated = True
        try:
            self._validate(trainer)
        except interrupt.Stopped:
            trainer.validated = False
        trainer.acc.wait_for_everyone()

    def _validate(self, trainer) -> None:
        cfg, evaluator, spread = self.cfg, self.evaluator, Spread(trainer.acc)
        teacher_grid = self.folder / "samples" / "teacher.png"
        if spread.decided(evaluator.protocol.few_step and not teacher_grid.exists()):
            images = evaluator.spread_images(spread, "teacher", cfg.grid, cfg.seed)
            if images is not None:
                if evaluator.label_free:
                    write_json(self.folder / "samples" / "teacher.json", looks(images))
                save_grid(images, teacher_grid)
        with averaged(trainer):
            grid = evaluator.spread_images(spread, "student", cfg.grid, cfg.seed)
            if grid is not None:
                save_grid(grid, self.folder / "samples" / f"step_{trainer.step:06d}.png")
                _save_requests(evaluator, grid, self.folder)
            images = None
            if cfg.validation_samples:
                num = max(cfg.grid, cfg.validation_samples)
                images = evaluator.spread_images(spread, "student", num, cfg.seed + 1_000_000)
            if grid is not None:
                self._look(trainer, grid, images)
                refresh_report(self.folder, running=True)

    def _look(self, trainer, grid: Tensor, images: Tensor | None) -> None:
        """Score what was drawn, and keep the weights if they are the best; the main process alone."""
        scores = self._beside_teacher(grid)
        if images is not None:
            scores |= self.evaluator.score(images)
        trainer.write_metrics({"step": trainer.step, **{f"validation/{k}": v for k, v in scores.items()}})
        score = scores.get(self.keep_by)
        best = self.cfg.keep == "best"
        if best and not trainer.step:  # what was not trained is not kept, however good
            return
        if score is not None and self._is_better(score, trainer.best.get("score")):
            trainer.best = {"score": score, "step": trainer.step}
            if best:
                write_tensors(self.folder / "best.safetensors", trainer.student.trainable())

    def _beside_teacher(self, images: Tensor) -> dict[str, float]:
        """How the grid's colours differ from the teacher's of the same requests, where no network judges
        them.
        """
        file = self.folder / "samples" / "teacher.json"
        if not self.evaluator.label_free or not file.is_file():
            return {}
        teacher = read_json(file, "samples/teacher.json", "delete it, and the picture beside it")
        return against_teacher(looks(images), teacher)

    def _is_better(self, score: float, before: float | None) -> bool:
        if before is None:
            return True
        return score > before if self.better[self.keep_by] == "higher" else score < before


def _save_requests(evaluator: Evaluator, images: Tensor, folder: Path) -> None:
    save_requests(images, evaluator.requests.words(len(images)), folder / "samples" / "requests.json")


def refresh_report(folder: Path, running: bool) -> None:
    """Write the page of a run that goes on, or that ended early. A page that cannot be written stops no
    training.
    """
    from fastgen.evaluation.report import write_report

    try:
        write_report(folder, running)
    except Exception as error:
        warn(f"report: not refreshed ({first_line(error)})")


def choose_metric(cfg: EvalConfig, better: dict, least: dict[str, float]) -> str:
    """The validation metric that decides which weights are best; a UserError where `keep: best` has none, or
    one that needs more samples (`least`, by metric) than validation draws.
    """
    if cfg.keep_by and cfg.keep_by not in better:
        known = ", ".join(better) or "none; give eval.metrics"
        raise UserError(
            "eval.keep_by", f"found {cfg.keep_by!r}", f"choose one of this run's metrics: {known}"
        )
    if cfg.keep == "best" and not better:
        found = "no metric says which weights are best"
        raise UserError("eval.keep", found, "give eval.metrics, or set it to last")
    num = max(cfg.grid, cfg.validation_samples)
    fits = [name for name in better if least.get(name, 0) <= num]
    chosen = cfg.keep_by or next(iter(fits or better), "")
    if cfg.keep == "best" and chosen not in fits:
        asked = f"{least[chosen]} samples" if least[chosen] < math.inf else "several samples of each prompt"
        found = f"found {cfg.validation_samples}; {chosen}, which says what is best, needs {asked}"
        raise UserError("eval.validation_samples", found, "give as many, or another eval.keep_by")
    return chosen


def finish(trainer, validator: Validator) -> dict:
    """Export, measure, report; prints one short table and where everything is. The export is whole before
    anything is measured; its card is written again with the numbers.
    """
    from fastgen.evaluation.diagnostics import warnings
    from fastgen.evaluation.report import write_report
    from fastgen.evaluation.run_files import read_metrics
    from fastgen.export.load import sample_command

    folder, evaluator, cfg = trainer.folder, validator.evaluator, validator.cfg
    best = _choose_weights(trainer, cfg.keep)
    metrics = read_metrics(folder / "metrics.jsonl")
    with averaged(trainer):
        _check_finite(trainer, evaluator)
        with interrupt.deferred():
            exported = trainer.exported = _export(trainer)
        with interrupt.at_once(), _room(exported):
            results = measure(evaluator, _show(evaluator, folder, cfg), cfg.remeasure_teacher)
    decay = f"EMA {trainer.ema.decays[0]:g}" if trainer.ema.decays else "raw"
    results["protocol"]["weights"] = f"{decay}, step {trainer.best['step'] if best else trainer.step}"
    results["curve"] = _curve(metrics, validator.keep_by)
    if stages := _by_stage(metrics, trainer.cast.stages):
        results["stages"] = stages
    results["train"] = {"seconds": trainer.seconds, "steps": trainer.step, "peak_rss_mb": peak_rss_mb()}
    with interrupt.deferred(), _room(exported):
        write_json(folder / "results.json", results)
        if exported is not None:
            _write_cards(trainer, exported, results, evaluator.protocol.few_step)
        report = write_report(folder)
    print(table(results))
    if "teacher_measured" in results["protocol"]:
        print("teacher's numbers are those on record; eval.remeasure_teacher true measures it again")
    for seen, cure in warnings(metrics, results):
        print(f"warning: {seen}; try {cure}")
    print(f"report  {report}")
    if exported is None:
        print("export  none: an analytic teacher's student is no diffusers network")
    else:
        print(f"export  {exported}\nsample  {sample_command(exported)}")
    return results


def _choose_weights(trainer, keep: str) -> bool:
    """Load the best weights where they are wanted, average with another student; whether they were."""
    from fastgen.export.load import fuse

    student, kept = trainer.cast.student_cfg, trainer.folder / "best.safetensors"
    best = keep == "best" and kept.exists()
    if best:
        _load_best(trainer, kept)
    if student.fuse:
        fuse(_kept(trainer), student.fuse, student.fuse_weight)
    return best


def _show(evaluator: Evaluator, folder: Path, cfg: EvalConfig):
    """Saves the first of the measured images, of all contenders and every step count measured."""

    def show(who: str, steps: int, images: Tensor) -> None:
        if steps in (0, *cfg.student_steps):
            name = who.removesuffix("_student") + (f"_{steps}_steps" if steps else "")
            save_grid(images[: cfg.grid], folder / "samples" / f"{name}.png")
            _save_requests(evaluator, images[: cfg.grid], folder)

    return show


@torch.no_grad()
def _check_finite(trainer, evaluator: Evaluator) -> None:
    """Raise NotFinite unless the weights are finite in the precision they are exported in and give finite
    pictures: nothing else is exported.
    """
    from fastgen.training.exporting import export_dtype

    dtype = export_dtype(trainer)
    for name, value in trainer.student.trainable().items():
        if not value.to(dtype).isfinite().all():
            raise NotFinite(f"step {trainer.step}: {name} is not finite in {str(dtype).split('.')[1]}")
    evaluator.images("student", 2, evaluator.protocol.seed)


def _export(trainer) -> Path | None:
    """The export in its place; one made before stays until the new one is whole."""
    from fastgen.training.exporting import export_run

    if trainer.cast.teacher.is_analytic:
        return None
    folder = trainer.folder / "export"
    try:
        return export_run(trainer, folder, {})
    except Exception as error:
        shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)
        if not disk_error(error):
            raise
        found = f"could not be written ({error}); the trained weights are safe in the last checkpoint"
        way = "free some space, then the same command with --resume exports and measures"
        raise UserError("export", found, way) from None


@contextmanager
def _room(exported: Path | None):
    """A full disk while measuring is one line that says what is safe."""
    try:
        yield
    except Exception as error:
        if not disk_error(error):
            raise
        safe = f"the export is whole: {exported}" if exported else "the last checkpoint is whole"
        way = "free some space, then the same command with --resume measures again"
        raise UserError("results", f"could not be written ({error}); {safe}", way) from None


def _write_cards(trainer, exported: Path, results: dict, few_step: bool) -> None:
    from fastgen.training.exporting import write_cards

    write_cards(trainer, exported, results)
    if not few_step:
        write_json(exported / "card.json", teacher_card(results))


def _curve(metrics: list[dict], name: str) -> dict[str, float]:
    """The metric that chooses the best weights at each validation, by step."""
    key = f"validation/{name}"
    return {str(r["step"]): r[key] for r in metrics if key in r}


def _by_stage(metrics: list[dict], stages: Sequence[StageConfig]) -> list[dict]:
    """What was validated at the start of a run of several stages and where each of them ended; empty without
    numbers.
    """
    if len(stages) == 1:
        return []
    ends = list(itertools.accumulate([s.max_train_steps for s in stages], initial=0))
    seen = {r["step"]: r for r in metrics if any(key.startswith("validation/") for key in r)}
    names = [("start", ""), *((s.name, s.objective.name) for s in stages)]
    return [
        {"stage": name, "objective": method, "step": end, **_validated(seen[end])}
        for (name, method), end in zip(names, ends)
        if end in seen
    ]


def _validated(row: dict) -> dict[str, float]:
    return {k.removeprefix("validation/"): v for k, v in row.items() if k.startswith("validation/")}


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
