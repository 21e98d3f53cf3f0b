"""Teacher, untrained student and student of a run on the same requests and seeds, measured and timed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.core import interrupt
from fastgen.core.batch import milder
from fastgen.core.errors import UserError
from fastgen.core.progress import tracked
from fastgen.diffusion.spectra import radial_power, spectrum_gap
from fastgen.evaluation import label_free, recorded_teachers
from fastgen.evaluation.diagnostics import look
from fastgen.evaluation.metrics.agreement import agreement, library_of, prompt_recall
from fastgen.evaluation.metrics.completion import CloudMeasurer
from fastgen.evaluation.metrics.metric import Better
from fastgen.evaluation.metrics.mixtures import ToyMeasurer
from fastgen.evaluation.metrics.pixels import fidelity, psnr
from fastgen.evaluation.metrics.speed import Generator, interleaved, nfe
from fastgen.evaluation.reconstruction import Reconstructions, reconstructions
from fastgen.evaluation.requests import Requests
from fastgen.evaluation.run_metrics import RunMetrics, Samples
from fastgen.evaluation.spread import Spread
from fastgen.networks.feature_net import measure as measured
from fastgen.sampling.solvers import ImageNoise, check_finite, sample_student, sample_teacher

MOST_FORGOTTEN, MOST_SHOWN = 500, 100
"""samples of what was to be forgotten: of a student, of its slower teacher"""
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
    forgets: tuple[str, ...] = ()
    """classes or words of prompts that the student was to forget; the others alone are measured"""
    milder: bool = False
    """whether the teacher is shown less degraded pictures than the student"""
    own_data: bool = False
    """whether the data are a user's: their captions and images are measured against, no bundled set's"""


class Evaluator:
    """Samples the three contenders on the same requests and seeds, and scores them."""

    def __init__(self, protocol: EvaluationProtocol, cast, data, metrics: RunMetrics | None = None):
        """metrics: those that the user chose, besides the ones of the teacher's own set."""
        from fastgen.evaluation.metrics.fd_mini import measurer_for, shows

        self.protocol, self.cast, self.metrics = protocol, cast, metrics
        self.requests = Requests(cast.teacher, data, protocol.own_data)
        self.forgotten: Requests | None = None
        """requests for what the student was to forget"""
        self.unseen = self.requests.unseen()
        """requests for what nobody was trained on"""
        self.x0 = getattr(data, "x0", None) if protocol.own_data else None
        teacher = cast.teacher
        values = () if teacher.is_analytic else self.requests.values(protocol.forgets)
        if values:
            asked = shows(self.requests.attributes, values)
            self.requests, self.forgotten = self.requests.divided(asked)
        self.measurer = (
            ToyMeasurer(teacher.backbone)
            if teacher.is_analytic
            else CloudMeasurer(self.requests.truth, self.requests.again)
            if self.requests.truth is not None
            else None
            if protocol.own_data
            else measurer_for(teacher.info, cast.device, values, self.requests.renders())
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
    def _batch(
        self, who: str, first: int, num: int, seed: int, steps: int, requests: Requests | None = None
    ) -> Tensor:
        """The batch that begins with image `first` of num."""
        codec, device, requests = self.cast.teacher.codec, self.cast.device, requests or self.requests
        index = torch.arange(first, min(first + self.protocol.batch_size, num))
        cond = {k: v.to(device) for k, v in requests.cond(index).items()}
        uncond = {k: v.to(device) for k, v in requests.null(index).items()}
        x0 = self._sample(who, [seed + int(i) for i in index], cond, uncond, steps)
        images = codec.shown(x0, cond) if len(codec.shape) > 1 else x0
        check_finite(f"samples of the {who.replace('_', ' ')}", x0, images)
        interrupt.check()
        return images.cpu()

    def _sample(self, who: str, seeds: list[int], cond: dict, uncond: dict, steps: int) -> Tensor:
        cast, shape, device = self.cast, self.cast.teacher.codec.shape, self.cast.device
        student = cast.parts["student"]
        if who == "teacher" and self.protocol.milder:
            cond, uncond = milder(cond), milder(uncond)
        if who == "teacher" or not self.protocol.few_step:
            role = cast.parts["teacher"] if who == "teacher" else student
            noise = ImageNoise(seeds, shape, device).first
            num = steps or self.protocol.teacher_steps
            return sample_teacher(role, noise, cond, uncond, num, self.protocol.guidance)
        student = student.with_steps(steps)
        if who == "untrained_student":
            student = student.with_network(cast.untrained())
        return sample_student(student, seeds, shape, cond, device)

    def score(self, images: Tensor, who: str = "student", steps: int = 0) -> dict[str, float]:
        """Metrics of images that `who` made for the first len(images) requests."""
        num = len(images)
        found = {} if self.measurer is None else self.measurer.compare(images, self.requests.wanted(num))
        if (originals := self.requests.restored(num)) is not None:
            found |= fidelity(images, originals)
        if (frames := self.requests.begun(num)) is not None:
            found["first_frame_psnr"] = float(psnr(images[:, :, 0].double(), frames.double()).mean())
        if self.metrics is None:
            return found
        texts, wanted = self.requests.texts(num), self.requests.wanted(num)
        about = Samples(texts, wanted, len(self.requests.rows), self._generator(who, steps))
        return found | self.metrics.scores(images, about)

    def unlearned(self, who: str, images: Tensor, steps: int = 0) -> dict[str, float]:
        """What is left of what the student was to forget, on images of it; `images` are those that `who` made
        for the other requests. Empty where nothing was to be forgotten.
        """
        from fastgen.evaluation.metrics.fd_mini import Measurer

        if self.forgotten is None or not isinstance(self.measurer, Measurer):
            return {}
        num, seed = min(len(images), MOST_SHOWN if who == "teacher" else MOST_FORGOTTEN), self.protocol.seed
        firsts = range(0, num, self.protocol.batch_size)
        gone = torch.cat([self._batch(who, i, num, seed, steps, self.forgotten) for i in firsts])
        kept = (images, self.requests.wanted(len(images)))
        return self.measurer.unlearned(kept, (gone, self.forgotten.wanted(num)))

    def recalled(self, who: str, images: Tensor, steps: int = 0) -> dict[str, float]:
        """How well a library of prompts is told apart by its images, and what is drawn of prompts that are
        held out; `images` are those that `who` made for the other requests. Empty without such prompts.
        """
        from fastgen.evaluation.metrics.fd_mini import Measurer

        if self.unseen is None or not isinstance(self.measurer, Measurer):
            return {}
        num, seed = min(len(images), MOST_SHOWN), self.protocol.seed
        firsts = range(0, num, self.protocol.batch_size)
        other = torch.cat([self._batch(who, i, num, seed, steps, self.unseen) for i in firsts])
        seen, unseen = (measured(self.measurer.net, one)["logits"] for one in (images, other))
        wanted, new = self.requests.wanted(len(images)), self.unseen.wanted(num)
        library = library_of(self.requests.attributes, self.unseen.attributes)
        other_found = agreement(unseen, new) | prompt_recall(unseen, new, library)
        return prompt_recall(seen, wanted, library) | {f"{k}_held_out": v for k, v in other_found.items()}

    def _generator(self, who: str, steps: int) -> Generator:
        """What draws the samples of `who`, for metrics of its speed."""
        num = min(SPEED_BATCH, self.protocol.batch_size)
        return Generator(partial(self._batch, who, 0, num, 0, steps), num, self.nfe(who, steps))

    def better(self) -> dict[str, Better]:
        """Which way is better, by the name of every metric that may choose the weights to keep."""
        own: dict[str, Better] = {} if self.measurer is None else {self.measurer.primary: "lower"}
        chosen = self.metrics.better if self.metrics else {}
        return {**{k: v for k, v in chosen.items() if v != "none"}, **own}

    def least(self) -> dict[str, float]:
        """Samples that metrics of `better` need, where that is more than one."""
        return self.metrics.least(len(self.requests.rows)) if self.metrics else {}

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
        student = self.cast.parts["student"]
        return (student.with_steps(steps) if steps else student).nfe


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


def measure(
    evaluator: Evaluator,
    show: Callable[[str, int, Tensor], None] | None = None,
    remeasure_teacher: bool = True,
) -> dict:
    """results.json but for its train section: same requests and seeds for all, timed side by side.

    show is handed each contender's measured images: its name, the step count (0: its own), [N, C, H, W].
    Without remeasure_teacher the numbers of a bundled teacher are those on record for this protocol, where
    there are any, and one batch of its samples is drawn to be shown.
    """
    protocol = evaluator.protocol
    who = ["teacher", "untrained_student", "student"] if protocol.few_step else ["student"]
    num = protocol.num_samples
    counts = {n: (protocol.teacher_samples or num) if num and n == "teacher" else num for n in who}
    known = (
        None if remeasure_teacher or not num else recorded_teachers.find(evaluator, counts.get("teacher", 0))
    )

    seen: dict[str, dict] = {}
    teacher: dict = {}
    codec = evaluator.cast.teacher.codec
    recon = reconstructions(evaluator.measurer, codec, evaluator.cast.device, protocol.batch_size)

    def row(name: str, steps: int = 0) -> dict:
        if not counts[name]:
            return {"nfe": evaluator.nfe(name, steps)}
        recorded = known if name == "teacher" else None
        drawn = min(protocol.batch_size, counts[name]) if recorded else counts[name]
        images = evaluator.images(name, drawn, protocol.seed, steps)
        if show is not None:
            show(name, steps, images)
        if recorded:
            seen[name] = recorded["look"]
            _spectrum(name, images, teacher)
            return recorded["teacher"]
        seen.setdefault(name, look(images, len(evaluator.requests.rows)))
        return scored(evaluator, name, images, steps, recon, teacher)

    speed_batch = min(SPEED_BATCH, protocol.batch_size)
    seconds = _times(evaluator, who, speed_batch) if num else {}
    order = [n for n in ("teacher", "student", "untrained_student") if n in who]
    found: dict[str, Any] = {
        n: {"nfe": evaluator.nfe(n), **({"seconds_per_sample": seconds[n]} if num else {}), **row(n)}
        for n in order
    }
    steps = protocol.student_steps or (() if protocol.few_step else (1, 4, 20, 50))
    if steps and num:
        found["student_by_steps"] = {str(n): row("student", n) for n in steps}
    found |= _references(evaluator, recon) if num else {}
    if seen:
        found["look"] = seen
    if evaluator.metrics is not None:
        found["chosen"] = list(evaluator.metrics.better)
    found["protocol"] = _described(evaluator, counts, speed_batch)
    if known:
        found["protocol"]["teacher_measured"] = known["measured"]
    return found


def _references(evaluator: Evaluator, recon: Reconstructions | None) -> dict[str, dict[str, float]]:
    """Numbers of what no network has made: real images, these through the autoencoder, pictures enlarged."""
    num, found = evaluator.protocol.num_samples, {}
    if evaluator.measurer is not None and (floor := evaluator.measurer.floor(num)):
        found["floor"] = floor
    if recon is not None:
        found["autoencoder"] = recon.own()
    if (enlarged := evaluator.requests.enlarged(num)) is not None:
        found["enlarged"] = {"nfe": 0, **evaluator.score(enlarged)}
    return found


def _described(evaluator: Evaluator, counts: dict[str, int], speed_batch: int) -> dict[str, Any]:
    """What the numbers are to be quoted with."""
    protocol = evaluator.protocol
    return {
        "num_samples": protocol.num_samples,
        "teacher_samples": counts.get("teacher", 0),
        "seed": protocol.seed,
        **(evaluator.measurer.describe() if evaluator.measurer else {"extractor": "none"}),
        **({"metrics": evaluator.metrics.describe()} if evaluator.metrics else {}),
        **({"tuned_by": evaluator.tuned_by} if evaluator.tuned_by else {}),
        "guidance": protocol.guidance,
        "teacher_steps": protocol.teacher_steps,
        "student_times": list(evaluator.cast.parts["student"].times) if protocol.few_step else None,
        "speed_batch": speed_batch,
        "device": str(evaluator.cast.device),
        "threads": torch.get_num_threads(),
    }


def scored(
    evaluator: Evaluator, name: str, images: Tensor, steps: int, recon: Reconstructions | None, teacher: dict
) -> dict[str, float]:
    """All numbers of the images of one contender; `teacher` keeps what the others are compared with."""
    beside = _spectrum(name, images, teacher)
    beside |= _beside_teacher(evaluator, name, images, teacher) if evaluator.label_free else {}
    if recon is not None:
        beside |= recon.distance(images)
    beside |= evaluator.unlearned(name, images, steps) | evaluator.recalled(name, images, steps)
    return {"nfe": evaluator.nfe(name, steps), **evaluator.score(images, name, steps), **beside}


def _spectrum(name: str, images: Tensor, known: dict) -> dict[str, float]:
    """How far the power spectrum of pictures is from the teacher's, who comes first and is `known`."""
    if images.ndim != 4:
        return {}
    power = radial_power(images)
    if name == "teacher":
        known["power"] = power
        return {}
    return {"spectrum_gap": spectrum_gap(power, known["power"])} if "power" in known else {}


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
