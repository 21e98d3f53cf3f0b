"""Teacher, untrained student and student of a run on the same requests and seeds, measured and timed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.core import interrupt
from fastgen.core.batch import select
from fastgen.core.errors import UserError
from fastgen.core.progress import tracked
from fastgen.evaluation import label_free
from fastgen.evaluation.diagnostics import look
from fastgen.evaluation.metrics.metric import Better
from fastgen.evaluation.metrics.mixtures import ToyMeasurer
from fastgen.evaluation.metrics.speed import Generator, interleaved, nfe
from fastgen.evaluation.reconstruction import NAME as RECON
from fastgen.evaluation.reconstruction import reconstructions
from fastgen.evaluation.run_metrics import RunMetrics, Samples
from fastgen.evaluation.spread import Spread
from fastgen.networks.codecs import TextCodec
from fastgen.roles.roles import Role
from fastgen.sampling.solvers import ImageNoise, check_finite, sample_student, sample_teacher

SPEED_BATCH = 20
"""samples of a timed call, or the batch size where that is less"""


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How the contenders of a run are sampled and measured."""

    few_step: bool
    """whether the student takes its own few steps; if not, it is sampled like its teacher"""
    guidance: float
    """of the teacher"""
    teacher_steps: int
    num_samples: int
    """of the student; 0: nothing is measured"""
    teacher_samples: int
    """0: as many as the student's"""
    validation_samples: int
    """of each validation while training; 0: none"""
    student_steps: tuple[int, ...]
    """further step counts of the student"""
    batch_size: int
    seed: int
    """of the first sample"""
    own_data: bool = False
    """whether the data are a user's: their captions and images are measured against, no bundled set's"""


MOST_WIDTH = 100
"""characters of a line of the final table"""


class Requests:
    """What a generator is to draw: condition rows, and the attributes a measuring net should find."""

    def __init__(self, teacher, data, own_data: bool = False):
        """own_data: captions are those of the data, also for a teacher of a bundled set."""
        codec = teacher.codec
        self.codec, self.uncond, self.own = codec, data.uncond, None
        self.attributes: dict[str, Tensor] = {}
        self.captions: list[str] | None = None
        """the text of each row of the table"""
        measure = (teacher.info or {}).get("measure")
        if isinstance(codec, TextCodec) and measure == "tinted" and not own_data:
            from fastgen.data.bundled import load_images

            held = load_images("tinted", "heldout")
            assert held.captions is not None and held.attributes is not None, "tinted images have both"
            unique = sorted(set(held.captions))
            self.table = {k: v.cpu() for k, v in codec.prompts(unique).items()}
            where = {text: i for i, text in enumerate(unique)}
            self.rows = torch.tensor([where[c] for c in held.captions])
            self.attributes, self.captions = held.attributes, unique
        elif codec.num_classes:
            self.table = codec.labels(torch.arange(codec.num_classes))
            self.rows = torch.arange(codec.num_classes)
            self.attributes = {"class": self.rows}
        else:
            self.table, self.rows = data.cond_table, data.rows
            self.own, self.captions = (data if data.own else None), data.texts

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        if self.own is not None:
            return self.own.cond(index % len(self.rows))
        return select(self.table, self.rows[index % len(self.rows)])

    def null(self, index: Tensor) -> dict[str, Tensor]:
        if self.own is not None:
            return self.own.null(index % len(self.rows))
        return {k: v.expand(len(index), *v.shape[1:]) for k, v in self.uncond.items()}

    def texts(self, num: int) -> list[str] | None:
        """The prompts of the first num requests; None for a teacher that takes none."""
        if self.captions is None:
            return None
        return [self.captions[int(i)] for i in self.rows[torch.arange(num) % len(self.rows)]]

    def words(self, num: int) -> list[str]:
        """What the first num requests ask for, as people read it: prompts, names of classes, or nothing."""
        texts = self.texts(num)
        if texts is None and self.codec.num_classes:
            names = getattr(self.codec, "class_names", [])
            rows = [int(self.rows[i % len(self.rows)]) for i in range(num)]
            texts = [names[row] if row < len(names) else f"class {row}" for row in rows]
        return texts or [""] * num

    def wanted(self, num: int) -> dict[str, Tensor]:
        index = torch.arange(num) % len(self.rows)
        return {k: v[index] for k, v in self.attributes.items()}


class Evaluator:
    """Samples the three contenders on the same requests and seeds, and scores them."""

    def __init__(self, protocol: EvaluationProtocol, cast, data, metrics: RunMetrics | None = None):
        """metrics: those that the user chose, besides the ones of the teacher's own set."""
        from fastgen.evaluation.metrics.fd_mini import measurer_for

        self.protocol, self.cast, self.metrics = protocol, cast, metrics
        self.requests = Requests(cast.teacher, data, protocol.own_data)
        self.x0 = getattr(data, "x0", None) if protocol.own_data else None
        teacher = cast.teacher
        self.measurer = (
            ToyMeasurer(teacher.backbone)
            if teacher.is_analytic
            else None
            if protocol.own_data
            else measurer_for(teacher.info, cast.device)
        )
        if self.measurer is not None:
            check_counts(protocol, self.measurer.primary, self.measurer.least)
        if metrics is not None:
            metrics.check_texts(self.requests.texts(1) is not None)
        self.label_free = self.measurer is None and len(teacher.codec.shape) > 1
        self.tuned_by: list[str] = []
        """names of the rewards that the student was tuned by, which measure nothing here"""

    def images(self, who: str, num: int, seed: int, steps: int = 0) -> Tensor:
        """num images in [0, 1] of "teacher", "student" or "untrained_student"; one seed per image.

        steps = 0 is what the contender is meant for. Autocast of the training loop does not reach here.
        Raises NotFinite for samples that are not; a signal that waits is obeyed between two batches.
        """
        what, size = f"drawing {num:,} samples of the {who.replace('_', ' ')}", self.protocol.batch_size
        firsts = tracked(range(0, num, size), what, num, size)
        return torch.cat([self._batch(who, first, num, seed, steps) for first in firsts])

    def spread_images(self, spread: Spread, who: str, num: int, seed: int) -> Tensor | None:
        """The same images, drawn by all processes of a run; None where this is not the main one."""
        what = f"drawing {num:,} samples of the {who.replace('_', ' ')}"
        return spread.samples(
            lambda first: self._batch(who, first, num, seed, 0), num, self.protocol.batch_size, what
        )

    @torch.no_grad()
    def _batch(self, who: str, first: int, num: int, seed: int, steps: int) -> Tensor:
        """The batch that begins with image `first` of num."""
        codec, device = self.cast.teacher.codec, self.cast.device
        index = torch.arange(first, min(first + self.protocol.batch_size, num))
        cond = {k: v.to(device) for k, v in self.requests.cond(index).items()}
        uncond = {k: v.to(device) for k, v in self.requests.null(index).items()}
        x0 = self._sample(who, [seed + int(i) for i in index], cond, uncond, steps)
        images = codec.decode(x0) if len(codec.shape) > 1 else x0
        check_finite(f"samples of the {who.replace('_', ' ')}", x0, images)
        interrupt.check()
        return images.cpu()

    def _sample(self, who: str, seeds: list[int], cond: dict, uncond: dict, steps: int) -> Tensor:
        cast, shape, device = self.cast, self.cast.teacher.codec.shape, self.cast.device
        student = cast.parts["student"]
        if who == "teacher" or not self.protocol.few_step:
            role = cast.parts["teacher"] if who == "teacher" else student
            noise = ImageNoise(seeds, shape, device).first
            num = steps or self.protocol.teacher_steps
            return sample_teacher(role, noise, cond, uncond, num, self.protocol.guidance)
        student = student.with_steps(steps)
        if who == "untrained_student":
            student = student.with_network(Role(cast.teacher.backbone))
        return sample_student(student, seeds, shape, cond, device)

    def score(self, images: Tensor, who: str = "student", steps: int = 0) -> dict[str, float]:
        """Metrics of images that `who` made for the first len(images) requests."""
        num = len(images)
        found = {} if self.measurer is None else self.measurer.compare(images, self.requests.wanted(num))
        if self.metrics is None:
            return found
        texts, wanted = self.requests.texts(num), self.requests.wanted(num)
        about = Samples(texts, wanted, len(self.requests.rows), self._generator(who, steps))
        return found | self.metrics.scores(images, about)

    def _generator(self, who: str, steps: int) -> Generator:
        """What draws the samples of `who`, for metrics of its speed."""
        num = min(SPEED_BATCH, self.protocol.batch_size)
        return Generator(partial(self._batch, who, 0, num, 0, steps), num, self.nfe(who, steps))

    def better(self) -> dict[str, Better]:
        """Which way is better, by the name of every metric that may choose the weights to keep."""
        own: dict[str, Better] = {} if self.measurer is None else {self.measurer.primary: "lower"}
        chosen = self.metrics.better if self.metrics else {}
        return {**{k: v for k, v in chosen.items() if v != "none"}, **own}

    def features(self, images: Tensor) -> Tensor:
        """[N, C], the teacher's own features."""
        null = {k: v[:1] for k, v in self.requests.null(torch.arange(1)).items()}
        return label_free.teacher_features(self.cast.teacher, images, null, self.protocol.batch_size)

    @torch.no_grad()
    def own_features(self, most: int) -> Tensor | None:
        """Those of the user's own images, the first `most`; None where the run has none, or a single one."""
        if self.x0 is None or len(self.x0) < 2:
            return None
        codec, size = self.cast.teacher.codec, self.protocol.batch_size
        x0 = self.x0[:most].float()
        images = torch.cat([codec.decode(part.to(self.cast.device)).cpu() for part in x0.split(size)])
        return self.features(images)

    def nfe(self, who: str, steps: int = 0) -> int:
        """Network evaluations per sample."""
        if who == "teacher" or not self.protocol.few_step:
            return nfe(steps or self.protocol.teacher_steps, self.protocol.guidance)
        return steps or len(self.cast.parts["student"].times)


def check_counts(protocol: EvaluationProtocol, primary: str, least: int) -> None:
    """Refuse, before anything is trained, sample counts that a run's metrics cannot be computed from."""
    counts = {"eval.num_samples": protocol.num_samples}
    if protocol.num_samples:
        counts["eval.teacher_samples"] = protocol.teacher_samples
    counts["eval.validation_samples"] = protocol.validation_samples
    for key, num in counts.items():
        if 0 < num < least:
            found = f"found {num}; {primary} and its companions need {least} samples or more"
            raise UserError(key, found, "raise it, or set it to 0 to measure nothing")


def measure(evaluator: Evaluator, show: Callable[[str, int, Tensor], None] | None = None) -> dict:
    """results.json but for its train section: same requests and seeds for all, timed side by side.

    show is handed each contender's measured images: its name, the step count (0: its own), [N, C, H, W].
    """
    protocol = evaluator.protocol
    who = ["teacher", "untrained_student", "student"] if protocol.few_step else ["student"]
    num = protocol.num_samples
    counts = {n: (protocol.teacher_samples or num) if num and n == "teacher" else num for n in who}

    seen: dict[str, dict] = {}
    teacher: dict = {}
    codec = evaluator.cast.teacher.codec
    recon = reconstructions(evaluator.measurer, codec, evaluator.cast.device, protocol.batch_size)

    def row(name: str, steps: int = 0) -> dict:
        if not counts[name]:
            return {"nfe": evaluator.nfe(name, steps)}
        images = evaluator.images(name, counts[name], protocol.seed, steps)
        if show is not None:
            show(name, steps, images)
        seen.setdefault(name, look(images, len(evaluator.requests.rows)))
        beside = _beside_teacher(evaluator, name, images, teacher) if evaluator.label_free else {}
        if recon is not None:
            beside |= recon.distance(images)
        return {"nfe": evaluator.nfe(name, steps), **evaluator.score(images, name, steps), **beside}

    speed_batch = min(SPEED_BATCH, protocol.batch_size)
    seconds = _times(evaluator, who, speed_batch)
    order = [n for n in ("teacher", "student", "untrained_student") if n in who]
    found: dict[str, Any] = {
        n: {"nfe": evaluator.nfe(n), "seconds_per_sample": seconds[n], **row(n)} for n in order
    }
    steps = protocol.student_steps or (() if protocol.few_step else (1, 4, 20, 50))
    if steps and num:
        found["student_by_steps"] = {str(n): row("student", n) for n in steps}
    if evaluator.measurer is not None and num:
        found["floor"] = evaluator.measurer.floor(num)
    if recon is not None and num:
        found["autoencoder"] = recon.own()
    if seen:
        found["look"] = seen
    if evaluator.metrics is not None:
        found["chosen"] = list(evaluator.metrics.better)
    times = list(evaluator.cast.parts["student"].times) if protocol.few_step else None
    found["protocol"] = {
        "num_samples": num,
        "teacher_samples": counts.get("teacher", 0),
        "seed": protocol.seed,
        **(evaluator.measurer.describe() if evaluator.measurer else {"extractor": "none"}),
        **({"metrics": evaluator.metrics.describe()} if evaluator.metrics else {}),
        **({"tuned_by": evaluator.tuned_by} if evaluator.tuned_by else {}),
        "guidance": protocol.guidance,
        "teacher_steps": protocol.teacher_steps,
        "student_times": times,
        "speed_batch": speed_batch,
        "device": str(evaluator.cast.device),
        "threads": torch.get_num_threads(),
    }
    return found


def _beside_teacher(evaluator: Evaluator, name: str, images: Tensor, known: dict) -> dict[str, float]:
    """Numbers that need no weights; `known` keeps the teacher's looks and features, who comes first, and the
    features of the user's own images.
    """
    own = label_free.looks(images)
    features = evaluator.features(images) if len(images) > 1 else None
    if "own" not in known:
        known["own"] = evaluator.own_features(len(images))
    beside: dict[str, float] = {}
    if features is not None and known["own"] is not None:
        beside = label_free.to_own_images(features, known["own"])
    if name == "teacher":
        known |= {"looks": own, "features": features}
    if "looks" not in known or name == "teacher":
        return own | beside
    beside |= label_free.against_teacher(own, known["looks"])
    if features is not None and known["features"] is not None:
        beside |= label_free.distances(features, known["features"])
    return own | beside


def _times(evaluator: Evaluator, who: list[str], num: int) -> dict[str, float]:
    draws = {name: partial(evaluator._batch, name, 0, num, 0, 0) for name in who}
    return interleaved(draws, num, repeats=3)


def table(results: dict) -> str:
    """One line each: teacher, untrained student, student (at every step count measured), real images."""
    first, last = (
        ("fd_mini", RECON, "energy_distance", "agreement", "recall", "clip"),
        ("nfe", "seconds_per_sample"),
    )
    chosen = tuple(results.get("chosen", ()))
    free = ("fd_own_images", "fd_teacher_features", "saturation_ratio", "sharpness_ratio", "diversity_ratio")
    wanted = tuple(dict.fromkeys((*first, *chosen, *free, *last)))
    rows = [
        (n.replace("_", " "), results[n]) for n in ("teacher", "untrained_student", "student") if n in results
    ]
    rows += [
        (f"student, {n} step{'s' * (n != '1')}", row)
        for n, row in results.get("student_by_steps", {}).items()
    ]
    rows += [("real (floor)", results["floor"])] if "floor" in results else []
    rows += [("autoencoder alone", results["autoencoder"])] if "autoencoder" in results else []
    columns = [c for c in wanted if any(c in row for _, row in rows)]
    names = {c: c.replace("_per_sample", "/sample") for c in columns}
    if 19 + 16 * len(columns) > MOST_WIDTH or any(len(n) > 15 for n in names.values()):
        return _upright(rows, names)
    lines = [" " * 19 + "".join(f"{n:>16}" for n in names.values())]
    for name, row in rows:
        lines.append(f"{name:<19}" + "".join(f"{row[c]:>16.4g}" if c in row else " " * 16 for c in columns))
    return "\n".join(lines)


def _upright(rows: list[tuple[str, dict]], names: dict[str, str]) -> str:
    """One line a metric, for long or many names."""
    first = max(map(len, names.values())) + 2
    widths = [max(len(name) + 2, 11) for name, _ in rows]
    lines = [" " * first + "".join(f"{name:>{w}}" for (name, _), w in zip(rows, widths))]
    for key, name in names.items():
        cells = [f"{row[key]:.4g}" if key in row else "" for _, row in rows]
        lines.append(f"{name:<{first}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths)))
    return "\n".join(line.rstrip() for line in lines)


def teacher_card(results: dict) -> dict:
    """What a denoiser trained by sft reaches at several step counts, beside the floor."""
    kept = {k: results[k] for k in ("student_by_steps", "floor", "autoencoder", "protocol") if k in results}
    train = results.get("train", {})
    return kept | ({"train": {k: train[k] for k in ("seconds", "steps")}} if train else {})
