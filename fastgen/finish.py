"""Validation during a run, and what follows it: the final table, results.json, export and report."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fastgen.checkpoint import write_tensors, write_text
from fastgen.ema import swapped
from fastgen.judge import Judge, measure, table
from fastgen.media import filmstrip, save_clip


def averaged(trainer):
    """Context in which the student holds its first EMA (nothing happens without one)."""
    decays = trainer.ema.decays
    return swapped(trainer.student.trainable(), trainer.ema.averages[decays[0]]) if decays else nullcontext()


class Validator:
    """Called at step 0 and every validation_steps: a grid from fixed seeds, and the cheap metric."""

    def __init__(self, cfg, cast, data, folder: Path):
        self.cfg, self.folder, self.judge = cfg, folder, Judge(cfg, cast, data)

    def __call__(self, trainer) -> None:
        if trainer.acc.is_main_process:
            self._validate(trainer)
        trainer.acc.wait_for_everyone()

    def _validate(self, trainer) -> None:
        cfg, judge = self.cfg.eval, self.judge
        teacher_grid = self.folder / "samples" / "teacher.png"
        if judge.few_step and not teacher_grid.exists():
            save_grid(judge.images("teacher", cfg.grid, cfg.seed), teacher_grid)
        with averaged(trainer):
            save_grid(
                judge.images("student", cfg.grid, cfg.seed),
                self.folder / "samples" / f"step_{trainer.step:06d}.png",
            )
            scores = {}
            if cfg.validation_samples:
                num = max(cfg.grid, cfg.validation_samples)
                scores = judge.score(judge.images("student", num, cfg.seed + 1_000_000))
            trainer.write_metrics({"step": trainer.step, **{f"validation/{k}": v for k, v in scores.items()}})
            primary = scores.get(judge.measurer.primary) if judge.measurer else None
            if primary is not None and primary < trainer.best.get("score", float("inf")):
                trainer.best = {"score": primary, "step": trainer.step}
                if cfg.keep == "best" and trainer.step:
                    write_tensors(self.folder / "best.safetensors", trainer.student.trainable())


def to_grid(images: Tensor, columns: int = 10) -> Tensor:
    """[N, C, H, W] in [0, 1] to one [H, W, 3] uint8 picture with a grey pixel around each image."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.5)
    padded = torch.cat([padded, torch.full((-len(images) % columns, *padded.shape[1:]), 0.5)])
    rows = padded.unflatten(0, (-1, columns))  # [R, columns, C, H, W]
    picture = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return (picture.expand(-1, -1, 3) * 255).round().byte()


def save_grid(images: Tensor, path: Path) -> None:
    """A grid PNG; points of an analytic teacher become a scatter plot, a clip a row of its frames (and a gif
    of all clips beside the picture).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if images.ndim == 2:
        return _scatter(images, path)
    from PIL import Image

    columns = 10
    if images.ndim == 5:
        moving = [to_grid(images[:, :, f], 4).numpy() for f in range(images.shape[2])]
        save_clip([Image.fromarray(f) for f in moving], path.with_suffix(".gif"))
        images, columns = filmstrip(images), 1
    scale = max(1, 64 // images.shape[-1])
    shown = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    Image.fromarray(to_grid(shown, columns).numpy()).save(path)


def _scatter(points: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 3))
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1 % points.shape[1]], s=4)
    figure.savefig(path)


def finish(trainer, judge: Judge) -> dict:
    """Measure, export, report; prints one short table and where everything is."""
    from fastgen.diagnose import warnings
    from fastgen.export import export_student, sample_command
    from fastgen.reload import fuse
    from fastgen.report import read_metrics, write_report

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
        results = measure(cfg, judge, show)
        decay = f"EMA {trainer.ema.decays[0]:g}" if trainer.ema.decays else "raw"
        results["protocol"]["weights"] = f"{decay}, step {trainer.best['step'] if best else trainer.step}"
        results["curve"] = _curve(metrics, judge)
        results["train"] = {"seconds": trainer.seconds, "steps": trainer.step, "peak_rss_mb": peak_rss_mb()}
        write_text(folder / "results.json", json.dumps(results, indent=2))
        exported = None
        if not trainer.cast.teacher.path.startswith("analytic:"):
            exported = export_student(trainer, folder / "export", results)
    if exported is not None and not judge.few_step:
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


def _curve(metrics: list[dict], judge: Judge) -> dict[str, float]:
    """The cheap metric at each validation, by step."""
    key = f"validation/{judge.measurer.primary}" if judge.measurer else ""
    return {str(r["step"]): r[key] for r in metrics if key in r}


def teacher_card(results: dict) -> dict:
    """What a denoiser trained by sft reaches at several step counts, beside the floor."""
    kept = {k: results[k] for k in ("student_by_steps", "floor", "protocol") if k in results}
    train = results.get("train", {})
    return kept | ({"train": {k: train[k] for k in ("seconds", "steps")}} if train else {})


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
