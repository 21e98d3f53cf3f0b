"""Validation during a run, and what follows it: the final table, results.json, export and report."""

import json
from pathlib import Path

import torch
from torch import Tensor

from fastgen.checkpoint import write_text
from fastgen.codecs import select
from fastgen.ema import swapped
from fastgen.objectives import REGISTRY
from fastgen.roles import Student
from fastgen.samplers import ImageNoise, sample_student, sample_teacher


class Requests:
    """What is asked of a generator: condition rows, and the attributes a measuring net should find."""

    def __init__(self, teacher, data):
        codec, self.attributes = teacher.codec, {}
        self.codec, self.uncond = codec, data.uncond
        measure = (teacher.info or {}).get("measure")
        if hasattr(codec, "prompts") and measure == "tinted":
            from fastgen.datasets import load_images

            held = load_images("tinted", "heldout")
            unique = sorted(set(held.captions))
            self.table = {k: v.cpu() for k, v in codec.prompts(unique).items()}
            where = {text: i for i, text in enumerate(unique)}
            self.rows = torch.tensor([where[c] for c in held.captions])
            self.attributes = held.attributes
        elif codec.num_classes:
            self.table = codec.labels(torch.arange(codec.num_classes))
            self.rows = torch.arange(codec.num_classes)
            self.attributes = {"class": self.rows}
        else:
            self.table, self.rows = data.cond_table, data.rows

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        return select(self.table, self.rows[index % len(self.rows)])

    def wanted(self, num: int) -> dict[str, Tensor]:
        index = torch.arange(num) % len(self.rows)
        return {k: v[index] for k, v in self.attributes.items()}


class Judge:
    """Samples the three contenders on the same requests and seeds, and scores them."""

    def __init__(self, cfg, cast, data):
        from eval.measure import measurer_for
        from eval.toy import ToyMeasurer

        self.cfg, self.cast = cfg, cast
        self.requests = Requests(cast.teacher, data)
        self.few_step = all(REGISTRY[s.objective.name].few_step for s in cfg.all_stages())
        analytic = cast.teacher.path.startswith("analytic:")
        self.measurer = ToyMeasurer(cast.teacher.backbone) if analytic else measurer_for(cast.teacher.info, cast.device)

    @torch.no_grad()
    def images(self, who: str, num: int, seed: int, steps: int = 0) -> Tensor:
        """num images in [0, 1] of "teacher", "student" or "untrained_student"; one seed per image."""
        cfg, codec, device = self.cfg, self.cast.teacher.codec, self.cast.device
        chunks = []
        for first in range(0, num, cfg.eval.batch_size):
            index = torch.arange(first, min(first + cfg.eval.batch_size, num))
            cond = {k: v.to(device) for k, v in self.requests.cond(index).items()}
            uncond = {k: v.expand(len(index), *v.shape[1:]).to(device) for k, v in self.requests.uncond.items()}
            seeds = [seed + int(i) for i in index]
            x0 = self._sample(who, seeds, cond, uncond, steps or cfg.teacher.num_steps)
            chunks.append((codec.decode(x0) if len(codec.shape) > 1 else x0).cpu())
        return torch.cat(chunks)

    def _sample(self, who: str, seeds: list[int], cond: dict, uncond: dict, steps: int) -> Tensor:
        cast, shape, device = self.cast, self.cast.teacher.codec.shape, self.cast.device
        student = cast.parts["student"]
        if who == "teacher" or not self.few_step:
            role = cast.parts["teacher"] if who == "teacher" else student
            noise = ImageNoise(seeds, shape, device).first
            return sample_teacher(role, noise, cond, uncond, steps, self.cfg.teacher.guidance)
        if who == "untrained_student":
            student = Student(cast.teacher.backbone, None, student.times, student.sampler)
        return sample_student(student, seeds, shape, cond, device)

    def score(self, images: Tensor) -> dict[str, float]:
        """Metrics of images made for the first len(images) requests."""
        return {} if self.measurer is None else self.measurer.compare(images, self.requests.wanted(len(images)))

    def nfe(self, who: str) -> int:
        from eval.speed import nfe

        if who == "teacher" or not self.few_step:
            return nfe(self.cfg.teacher.num_steps, self.cfg.teacher.guidance)
        return len(self.cast.parts["student"].times)


class Averaged:
    """Context in which the student holds its first EMA (nothing happens without one)."""

    def __init__(self, trainer):
        decays = trainer.ema.decays
        self.swap = swapped(trainer.student.trainable(), trainer.ema.averages[decays[0]]) if decays else None

    def __enter__(self):
        if self.swap:
            self.swap.__enter__()

    def __exit__(self, *error):
        if self.swap:
            self.swap.__exit__(*error)


class Validator:
    """Called by the trainer at step 0 and every validation_steps: a grid from fixed seeds, and the cheap metric."""

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
        with Averaged(trainer):
            num = max(cfg.grid, cfg.validation_samples)
            images = judge.images("student", num, cfg.seed + 1_000_000)
            save_grid(judge.images("student", cfg.grid, cfg.seed), self.folder / "samples" / f"step_{trainer.step:06d}.png")
            scores = judge.score(images) if cfg.validation_samples else {}
            trainer.write_metrics({"step": trainer.step, **{f"validation/{k}": v for k, v in scores.items()}})
            primary = scores.get(judge.measurer.primary) if judge.measurer else None
            if primary is not None and primary < trainer.best.get("score", float("inf")):
                trainer.best = {"score": primary, "step": trainer.step}
                if cfg.keep == "best" and trainer.step:
                    self._keep(trainer)

    def _keep(self, trainer) -> None:
        import os

        from safetensors.torch import save_file

        target = self.folder / "best.safetensors"
        temporary = target.with_suffix(".tmp")
        save_file({n: p.detach().cpu().contiguous() for n, p in trainer.student.trainable().items()}, temporary)
        os.replace(temporary, target)


def to_grid(images: Tensor, columns: int = 10) -> Tensor:
    """[N, C, H, W] in [0, 1] to one [H, W, C] uint8 picture with a grey pixel around each image."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.5)
    missing = -len(images) % columns
    padded = torch.cat([padded, torch.full((missing, *padded.shape[1:]), 0.5)])
    rows = padded.unflatten(0, (-1, columns))  # [R, columns, C, H, W]
    picture = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return (picture.expand(-1, -1, 3) * 255).round().byte()


def save_grid(images: Tensor, path: Path) -> None:
    """A grid PNG; points of an analytic teacher become a scatter plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if images.ndim == 2:
        return _scatter(images, path)
    from PIL import Image

    scale = max(1, 64 // images.shape[-1])
    shown = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    Image.fromarray(to_grid(shown).numpy()).save(path)


def _scatter(points: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 3))
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1 % points.shape[1]], s=4)
    figure.savefig(path)


def finish(trainer, judge: Judge) -> dict:
    """Measure, export, report; prints one short table and where everything is."""
    from fastgen.export import export_student, sample_command
    from fastgen.report import write_report

    folder, cfg = trainer.folder, trainer.cfg
    kept = folder / "best.safetensors"
    if cfg.eval.keep == "best" and kept.exists():
        _load_best(trainer, kept)
    with Averaged(trainer):
        results = measure(trainer, judge)
        write_text(folder / "results.json", json.dumps(results, indent=2))
        exported = None if trainer.cast.teacher.path.startswith("analytic:") else export_student(trainer, folder / "export", results)
    report = write_report(folder)
    print(table(results))
    print(f"report  {report}")
    if exported is None:
        print("export  none: an analytic teacher's student is no diffusers network")
    else:
        print(f"export  {exported}\nsample  {sample_command(exported)}")
    return results


@torch.no_grad()
def _load_best(trainer, file: Path) -> None:
    from safetensors.torch import load_file

    best = load_file(file)
    target = trainer.ema.averages[trainer.ema.decays[0]] if trainer.ema.decays else trainer.student.trainable()
    for name, value in target.items():
        value.copy_(best[name])


def measure(trainer, judge: Judge) -> dict:
    """results.json: every contender on the same requests and seeds, timed side by side."""
    cfg = trainer.cfg.eval
    who = ["teacher", "untrained_student", "student"] if judge.few_step else ["student"]
    rows, counts = {}, {}
    for name in who:
        counts[name] = (cfg.teacher_samples or cfg.num_samples) if name == "teacher" else cfg.num_samples
        scores = judge.score(judge.images(name, counts[name], cfg.seed)) if counts[name] else {}
        rows[name] = {"nfe": judge.nfe(name), "seconds_per_sample": 0.0, **scores}
    for name, value in _times(judge, who).items():
        rows[name]["seconds_per_sample"] = value
    found = {name: rows[name] for name in ("teacher", "student", "untrained_student") if name in rows}
    if not judge.few_step and judge.measurer is not None and cfg.num_samples:
        found["student_by_steps"] = {
            str(n): judge.score(judge.images("student", cfg.num_samples, cfg.seed, n)) for n in (1, 4, 20, 50)
        }
        found["floor"] = judge.measurer.floor(cfg.num_samples)
    described = judge.measurer.describe() if judge.measurer else {"extractor": "none"}
    found["protocol"] = {
        "num_samples": cfg.num_samples, "teacher_samples": counts.get("teacher", 0), "seed": cfg.seed,
        "guidance": trainer.cfg.teacher.guidance, **described,
    }
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["train"] = {"seconds": trainer.seconds, "steps": trainer.step, "peak_rss_mb": peak}
    return found


def _times(judge: Judge, who: list[str]) -> dict[str, float]:
    from eval.speed import interleaved

    num = min(20, judge.cfg.eval.batch_size)
    return interleaved({n: lambda n=n: judge.images(n, num, 0) for n in who}, num, repeats=3)


def table(results: dict) -> str:
    """Teacher, untrained student, student: one line each."""
    wanted = ("fd_mini", "energy_distance", "agreement", "recall", "clip", "nfe", "seconds_per_sample")
    rows = [n for n in ("teacher", "untrained_student", "student") if n in results]
    columns = [c for c in wanted if any(c in results[r] for r in rows)]
    lines = [" " * 18 + "".join(f"{c.replace('_per_sample', '/sample'):>17}" for c in columns)]
    for r in rows:
        cells = [f"{results[r][c]:>17.4g}" if c in results[r] else " " * 17 for c in columns]
        lines.append(f"{r.replace('_', ' '):<18}" + "".join(cells))
    return "\n".join(lines)
