"""What a run's curves and samples say is going wrong, with what to try: shown in the report and at the end.

Curves are cut into fifths. The thresholds are wide: a warning is meant to be right, not early.
"""

import torch
from torch import Tensor

COLLAPSE, SATURATION, RISE, LAG, LOGITS = 0.6, 1.25, 1.6, 2.5, 8.0


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
    found = [*_samples(results.get("look", {}))]
    players = {k.split("/")[0] for r in metrics for k in r if "/" in k}
    for student in sorted(p for p in players if p.startswith("student")):
        critic = "critic" + student.removeprefix("student")
        found += _student(metrics, student)
        found += _critic(metrics, student, critic)
    return found


def _samples(seen: dict) -> list[tuple[str, str]]:
    """The student's final samples beside the teacher's."""
    teacher, student, found = seen.get("teacher", {}), seen.get("student", {}), []
    if "spread" in teacher and "spread" in student and student["spread"] < COLLAPSE * teacher["spread"]:
        ratio = student["spread"] / teacher["spread"]
        told = f"student collapsed: images of one request differ {ratio:.2f} times as much as the teacher's"
        cure = "more critic updates (student_every), a lower optim.student.lr, a GAN or regression term"
        found.append((told, cure))
    if teacher and student and student["contrast"] > SATURATION * teacher["contrast"]:
        ratio = student["contrast"] / teacher["contrast"]
        told = f"student oversaturated: its images have {ratio:.2f} times the teacher's contrast"
        cure = "a lower teacher.guidance, a regression term (objective dmd), fewer steps of training"
        found.append((told, cure))
    return found


def fifths(metrics: list[dict], key: str) -> list[float]:
    """Means of a curve's fifths; empty where there are fewer than ten points."""
    values = [r[key] for r in metrics if isinstance(r.get(key), (int, float))]
    if len(values) < 10:
        return []
    cuts = [len(values) * i // 5 for i in range(6)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]


def _student(metrics: list[dict], student: str) -> list[tuple[str, str]]:
    spread = fifths(metrics, f"{student}/x_spread")
    if spread and spread[-1] < COLLAPSE * max(spread):
        told = f"{student} collapsed: the spread of its samples fell from {max(spread):.3g}"
        told += f" to {spread[-1]:.3g}"
        return [(told, "more critic updates (student_every), a lower optim.student.lr, or the GAN term")]
    return []


def _critic(metrics: list[dict], student: str, critic: str) -> list[tuple[str, str]]:
    found = []
    gap, error = fifths(metrics, f"{student}/real_fake_gap"), fifths(metrics, f"{critic}/critic_error")
    cure = "more critic updates (student_every), a higher optim.critic.lr, or a lower optim.student.lr"
    if gap and gap[-1] > RISE * min(gap):
        told = f"{critic} behind: mean |D_real - D_fake| rose from {min(gap):.3g} to {gap[-1]:.3g}"
        found.append((told, cure))
    elif gap and error and error[-1] > max(LAG * gap[-1], 0.15 * fifths(metrics, f"{student}/x_std")[-1]):
        told = f"{critic} behind: it is {error[-1]:.3g} off the student's exact score, D_real {gap[-1]:.3g}"
        found.append((told, cure))
    real, fake = fifths(metrics, f"{critic}/logit_real"), fifths(metrics, f"{critic}/logit_fake")
    if real and fake and real[-1] - fake[-1] > LOGITS:
        told = f"discriminator too strong: its logits stand {real[-1] - fake[-1]:.1f} apart"
        found.append((told, "r1_weight, a lower disc_weight, or noisier gan_time"))
    return found
