"""What a run's curves and samples say is going wrong, with what to try: shown in the report and at the end.

Curves are cut into fifths. The thresholds are wide: a warning is meant to be right, not early.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

EMPTY, FULL = 0.01, 0.98
COLLAPSE, SATURATION, RISE, LAG, LOGITS, FALL = 0.6, 1.25, 1.6, 2.5, 8.0, 1.4

Warnings = Iterator[tuple[str, str]]
"""(what is seen, what to try)"""


@torch.no_grad()
def look(images: Tensor, period: int) -> dict[str, float]:
    """contrast: spread of the pixels within an image; spread: of the images that answer one request, where
    image i answers request i modulo period.
    """
    flat = images.float().flatten(1)
    found = {"contrast": float(flat.std(1).mean())}
    whole = len(flat) // period * period
    if whole >= 2 * period:
        found["spread"] = float(flat[:whole].unflatten(0, (-1, period)).std(0).mean())
    return found


def warnings(metrics: list[dict], results: dict) -> list[tuple[str, str]]:
    """(what is seen, what to try) for a run's metrics.jsonl records and results.json."""
    found = [*_samples(results.get("look", {})), *_quality(results)]
    players = {k.split("/")[0] for r in metrics for k in r if "/" in k}
    for student in sorted(p for p in players if p.startswith("student")):
        number = student.removeprefix("student")
        found += [
            *_student(metrics, student),
            *_asset(metrics, student),
            *_critic(metrics, student, f"critic{number}"),
        ]
        weighs = any(f"{student}/log_ratio" in r for r in metrics)  # f_distill, uni_instruct
        found += [*_heads(metrics, f"critic{number}", weighs), *_heads(metrics, f"disc{number}", weighs)]
    return found


def _samples(seen: dict) -> Warnings:
    """The student's final samples beside the teacher's."""
    teacher, student = seen.get("teacher", {}), seen.get("student", {})
    if "spread" in teacher and "spread" in student and student["spread"] < COLLAPSE * teacher["spread"]:
        ratio = student["spread"] / teacher["spread"]
        symptom = (
            f"student collapsed: images of one request differ {ratio:.2f} times as much as the teacher's"
        )
        yield (
            symptom,
            "more critic updates (student_every), a lower optim.student.lr, a GAN or regression term",
        )
    if teacher and student and student["contrast"] > SATURATION * teacher["contrast"]:
        ratio = student["contrast"] / teacher["contrast"]
        symptom = f"student oversaturated: its images have {ratio:.2f} times the teacher's contrast"
        yield symptom, "a lower teacher.guidance, a regression term (objective dmd), fewer steps of training"


def _quality(results: dict) -> Warnings:
    """The distance at each validation, by step; the lowest may be what was exported."""
    curve, weights = results.get("curve", {}), results.get("protocol", {}).get("weights", "")
    if len(curve) > 2:
        best, last = min(curve, key=curve.get), list(curve)[-1]
        if curve[last] > FALL * curve[best]:
            symptom = f"student drifts: its distance rose from {curve[best]:.3g} at step {best}"
            symptom += f" to {curve[last]:.3g} at step {last}"
            keep = "" if weights.endswith(f"step {best}") else ", or eval.keep best"
            yield symptom, f"a lower optim.student.lr, a critic (disc) that learns faster{keep}"


def fifths(metrics: list[dict], key: str) -> list[float]:
    """Means of a curve's fifths; empty where there are fewer than ten points."""
    values = [r[key] for r in metrics if isinstance(r.get(key), (int, float))]
    if len(values) < 10:
        return []
    cuts = [len(values) * i // 5 for i in range(6)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]


def _student(metrics: list[dict], student: str) -> Warnings:
    spread = fifths(metrics, f"{student}/x_spread")
    if spread and spread[-1] < COLLAPSE * max(spread):
        symptom = f"{student} collapsed: its samples' spread fell from {max(spread):.3g} to {spread[-1]:.3g}"
        yield symptom, "more critic updates (student_every), a lower optim.student.lr, or the GAN term"


def _asset(metrics: list[dict], student: str) -> Warnings:
    """The mean opacity of what an asset's cameras see."""
    opacity = fifths(metrics, f"{student}/opacity")
    if opacity and opacity[-1] < EMPTY:
        cure = "a lower objective.asset.sparsity, a higher teacher.guidance, or another seed"
        yield f"the asset is empty: its pixels are {opacity[-1]:.1%} covered", cure
    if opacity and opacity[-1] > FULL:
        cure = "objective.asset.sparsity above 0, backgrounds that vary, or cameras farther away"
        yield f"the asset fills its box: its pixels are {opacity[-1]:.1%} covered", cure


def _critic(metrics: list[dict], student: str, critic: str) -> Warnings:
    gap, error = fifths(metrics, f"{student}/real_fake_gap"), fifths(metrics, f"{critic}/critic_error")
    cure = "more critic updates (student_every), a higher optim.critic.lr, or a lower optim.student.lr"
    if gap and gap[-1] > RISE * min(gap):
        yield f"{critic} behind: mean |D_real - D_fake| rose from {min(gap):.3g} to {gap[-1]:.3g}", cure
    elif gap and error and error[-1] > max(LAG * gap[-1], 0.15 * fifths(metrics, f"{student}/x_std")[-1]):
        symptom = (
            f"{critic} behind: it is {error[-1]:.3g} off the student's exact score, D_real {gap[-1]:.3g}"
        )
        yield symptom, cure


def _heads(metrics: list[dict], player: str, weighs: bool) -> Warnings:
    """Logits far apart; `weighs`: they are also the density ratio that weighs the score, at its levels."""
    real, fake = fifths(metrics, f"{player}/logit_real"), fifths(metrics, f"{player}/logit_fake")
    if real and fake and real[-1] - fake[-1] > LOGITS:
        symptom = f"discriminator too strong: its logits stand {real[-1] - fake[-1]:.1f} apart"
        levels = "noisier time and critic_time" if weighs else "noisier gan_time (gan.disc_time)"
        yield symptom, f"r1_weight, a lower disc_weight or optim.disc.lr, or {levels}"
