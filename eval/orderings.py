"""Published orderings (method A beats method B) against our own evidence, seed by seed.

configs/claims.yaml lists the claims. One holds when the better side's mean is ahead by more than the larger
spread of the two (a claim of no difference allows a share, `within`); with a smaller lead it is "within the
spread", and where a side has but one seed the lead is said to be of "one seed".

What is compared is a metric (`metric`, fd_mini unless given) at a step count (`steps`), or something of the
curve of fd_mini that a validating run keeps: the training steps to a quality (`reach`), its largest rise
(`steadier`). Where the two sides were measured on different numbers of samples, which a Frechet distance
depends on, each is divided by its teacher's at as many.
"""

import itertools
import math
import statistics

import yaml

from eval.results_table import cell, teacher_value
from fastgen.core.errors import UserError
from fastgen.core.paths import config

KEYS = {"claim", "paper", "better", "worse", "steps", "metric", "within", "reach", "steadier", "note"}
HIGHER = ("agreement", "agreement_motion", "contrast", "recall", "precision", "clip", "psnr", "ssim")


def load_claims() -> list[dict]:
    """The claims, each checked for its keys."""
    claims = yaml.safe_load(config("claims.yaml").read_text()) or []
    for claim in claims:
        wrong = set(claim) - KEYS or {"claim", "paper", "better", "worse"} - set(claim)
        if wrong:
            raise UserError("configs/claims.yaml", f"{', '.join(sorted(wrong))} in {claim}", f"keys: {KEYS}")
    return claims


def values(
    documents: list[dict], recipe: str, steps: int | None, metric: str, relative: bool = False
) -> list[float]:
    """The metric of a recipe's student at a step count (its own without one), one value per seed; relative
    to its teacher's at as many samples if `relative`.
    """
    found = []
    for document in (d for d in documents if d["recipe"] == recipe):
        results = document["results"]
        own = results.get("student", {})
        rows = {own.get("nfe"): own, None: own} | {
            int(n): row for n, row in results.get("student_by_steps", {}).items()
        }
        if metric in rows.get(steps, {}):
            scale = teacher_value(document, documents, metric) if relative else (1.0, True)
            if scale and scale[1]:  # of as many samples
                found.append(rows[steps][metric] / scale[0])
    return found


def samples(documents: list[dict], recipes: tuple[str, ...]) -> set[int]:
    """The numbers of samples that the students of these recipes were measured on."""
    return {d["results"].get("protocol", {}).get("num_samples") for d in documents if d["recipe"] in recipes}


def curves(documents: list[dict], recipe: str) -> list[dict[int, float]]:
    """Quality at each validation of a recipe's runs, by rising step; one curve per seed that has one."""
    found = [d["results"].get("curve", {}) for d in documents if d["recipe"] == recipe]
    return [dict(sorted((int(step), v) for step, v in curve.items())) for curve in found if curve]


def steps_to(curve: dict[int, float], reach: float) -> float:
    """Training steps to the first validation no worse than `reach`; infinite for one that never does."""
    return min((step for step, v in curve.items() if v <= reach), default=math.inf)


def setback(curve: dict[int, float]) -> float:
    """By how much, at most, a validation is worse than the best one before it."""
    best = itertools.accumulate(curve.values(), min)
    return max(v - b for v, b in zip(curve.values(), best))


def verdict(better: list[float], worse: list[float], higher: bool, within: float = 0.0) -> str:
    """What the numbers say about a claim; within: the share of the worse mean that is no difference."""
    if not better or not worse:
        return "not run yet"
    lead = statistics.mean(better) - statistics.mean(worse)
    lead = (lead if higher else -lead) + within * statistics.mean(worse)
    if math.inf in better or lead <= 0:
        return "**does not hold**"
    if math.inf not in worse:
        spread = max((statistics.stdev(v) for v in (better, worse) if len(v) > 1), default=0.0)
        if lead <= spread:
            return "within the spread"
    return "holds, one seed" if min(len(better), len(worse)) < 2 else "holds"


def rows(documents: list[dict], claims: list[dict]) -> list[list[str]]:
    """One table row per claim."""
    made = []
    for claim in claims:
        metric, steps = claim.get("metric", "fd_mini"), claim.get("steps")
        recipes = (claim["better"], claim["worse"])
        if "reach" in claim:
            sides = [[steps_to(c, claim["reach"]) for c in curves(documents, r)] for r in recipes]
            metric = f"steps to fd_mini {claim['reach']}"
        elif claim.get("steadier"):
            sides = [[setback(c) for c in curves(documents, r)] for r in recipes]
            metric = "largest rise of fd_mini while training"
        else:
            relative = metric == "fd_mini" and len(samples(documents, recipes)) > 1
            sides = [values(documents, recipe, steps, metric, relative) for recipe in recipes]
            metric += " of teacher" if relative else ""
        shown = [cell(v) or "-" for v in sides]
        at = f" at {steps}" if steps else ""
        said = verdict(*sides, metric in HIGHER, claim.get("within", 0.0))
        made.append(
            [
                claim["claim"],
                f"[{claim['paper']}](https://arxiv.org/abs/{claim['paper']})",
                f"`{claim['better']}`{at} {shown[0]}",
                f"`{claim['worse']}`{at} {shown[1]}",
                metric,
                "/".join(str(len(v)) for v in sides),
                f"{said}; {claim['note']}" if claim.get("note") else said,
            ]
        )
    return made


HEADER = ("claim", "paper", "should be better", "should be worse", "metric", "seeds", "here")


def drifts(documents: list[dict]) -> list[list[str]]:
    """One table row per watched recipe: where its curve was lowest, where it ended."""
    made = []
    for recipe in dict.fromkeys(d["recipe"] for d in documents):
        found = curves(documents, recipe)
        if found:
            best, last = [min(c.values()) for c in found], [list(c.values())[-1] for c in found]
            at = [f"{min(c, key=c.get)} of {max(c)}" for c in found]
            ratio = [b / a for a, b in zip(best, last)]
            made.append([f"`{recipe}`", ", ".join(at), cell(best), cell(last), cell(ratio, ".2f")])
    return made


DRIFTS = ("recipe", "step of the lowest", "lowest", "last", "last / lowest")
