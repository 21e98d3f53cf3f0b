"""The leaderboard's tables of numbers, one a teacher, from the evidence of finished runs."""

import math
import statistics

from eval import chain

NOTES = """fd_mini is a Frechet distance in the features of a small net of our own, against held-out real
images. It orders generators of one image set among each other and is not comparable with any published FID.
"of teacher" is the ratio to the teacher at as many samples, since fewer enlarge a Frechet distance: of the
same run, or where that measured its teacher on fewer, of another run of the same teacher and protocol; a "~"
says that there is none, so that the ratio flatters the student. With several seeds: mean +- standard
deviation. "teacher (NFE)" names the network calls of one teacher sample. Agreement: the share of samples in
which the measuring net finds everything the prompt names, "of" the teacher's share; of 500 samples it is
known to about 1.2 points on either side. Guidance lifts a teacher's share above that of real images, which
a method that learns from data alone goes towards. Minutes, steps and teacher calls are those of the recipe
and of all recipes whose runs it starts from ("own": its run alone); a teacher call is one network call for
one sample, as the method declares it, and a guided one counts two; frozen features that a GAN looks at are
not counted. Of clips, fvd_mini is the distance in the features of a space-time net of our own; motion is the
share whose motion is the requested one, the dynamic degree how many pixels things move from frame to
frame."""


def numbers(documents: list[dict], *path: str) -> list[float]:
    """One value per document, where it has it."""
    found = []
    for document in documents:
        value = document["results"]
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append(float(value))
    return found


def distance(documents: list[dict]) -> str:
    """The distance these results are ordered by."""
    known = ("energy_distance", "fvd_mini", "chamfer")
    return next((name for name in known if numbers(documents, "student", name)), "fd_mini")


def _key(document: dict, samples: str) -> tuple:
    """What a teacher's number depends on, with the count of samples named."""
    protocol = document["results"].get("protocol", {})
    about = ("guidance", "teacher_steps", "seed", "extractor", samples)
    return (document["teacher"], *(protocol.get(name) for name in about))


def teacher_value(document: dict, documents: list[dict], metric: str) -> tuple[float, bool] | None:
    """(the teacher's distance, whether it is of as many samples as the student's); None without a teacher."""
    for other in (document, *documents):
        found = numbers([other], "teacher", metric)
        if found and _key(other, "teacher_samples") == _key(document, "num_samples"):
            return found[0], True
    found = numbers([document], "teacher", metric)
    return (found[0], False) if found else None


def cell(values: list[float], digits: str = ".3g", scale: float = 1.0) -> str:
    """Mean, and with several seeds the spread, unless they agree."""
    if not values:
        return ""
    lost = values.count(math.inf)
    if lost:
        return "never" if lost == len(values) else f"never in {lost} of {len(values)} seeds"
    values = [scale * v for v in values]
    mean = f"{statistics.mean(values):{digits}}"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} +- {spread:.2g}" if spread > 1e-6 * abs(statistics.mean(values)) else mean


def _row(group: list[dict], path: tuple[str, ...], nfe: str, documents: list[dict]) -> list[str]:
    first, metric = group[0], distance(group)
    own, teachers = numbers(group, *path, metric), [teacher_value(d, documents, metric) for d in group]
    teacher = [t[0] for t in teachers if t]
    paired = [a / b for a, b in zip(own, teacher) if b] if len(own) == len(teacher) else []
    calls = numbers(group, "teacher", "nfe")
    reference = f"{cell(teacher)} ({calls[0]:.0f})" if teacher and calls else ""
    mark = "" if all(t[1] for t in teachers if t) else "~"
    protocol = first["results"].get("protocol", {})
    follows, wanted = (numbers(group, *p, "agreement") for p in (path, ("teacher",)))
    return [
        f"`{first['recipe']}`",
        first["objective"],
        first["student"],
        nfe,
        cell(own),
        reference,
        mark + cell(paired, ".2f"),
        cell(numbers(group, "untrained_student", metric)),
        cell(follows, ".1f", 100) + (f" of {cell(wanted, '.1f', 100)}" if follows and wanted else ""),
        cell(numbers(group, *path, "recall"), ".2f"),
        cell(numbers(group, "floor", metric)),
        str(protocol.get("num_samples", "")),
        str(len(group)),
        *(_clip_cells(group, path) if metric == "fvd_mini" else ()),
        *chain.cells(first["recipe"], documents),
    ]


def _clip_cells(group: list[dict], path: tuple[str, ...]) -> list[str]:
    """Agreement of motion and the dynamic degree, beside the teacher's, and the distance of frames."""
    motion, motions = (numbers(group, *p, "agreement_motion") for p in (path, ("teacher",)))
    moved, moves = (numbers(group, *p, "dynamic_degree") for p in (path, ("teacher",)))
    return [
        cell(motion, ".1f", 100) + (f" of {cell(motions, '.1f', 100)}" if motions else ""),
        cell(moved, ".2f") + (f" of {cell(moves, '.2f')}" if moves else ""),
        cell(numbers(group, *path, "fd_mini")),
    ]


HEADER = (
    "recipe", "method", "student", "NFE", "fd_mini", "teacher (NFE)", "of teacher", "untrained",
    "agreement %", "recall", "floor", "samples", "seeds", "minutes", "steps", "teacher calls (thousands)",
)  # fmt: skip


CLIPS = ("motion %", "dynamic degree", "fd_mini of frames")
"""columns of teachers of clips, after the seeds"""


def markdown(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _real(documents: list[dict]) -> list[str]:
    """What the measuring net finds in real images, of as many as any of these runs looked at."""
    counted = [d for d in documents if numbers([d], "floor", "agreement")]
    if not counted:
        return []
    most = max(counted, key=lambda d: d["results"].get("protocol", {}).get("num_samples", 0))
    share = 100 * most["results"]["floor"]["agreement"]
    return [f"Agreement of real images with their own labels: {share:.1f} %.", ""]


def measured(documents: list[dict]) -> str:
    """One table per teacher; one row per recipe and step count, seeds merged."""
    if not documents:
        return "No evidence yet."
    lines = NOTES.splitlines()
    for teacher in dict.fromkeys(d["teacher"] for d in documents):
        rows = []
        for recipe in dict.fromkeys(d["recipe"] for d in documents if d["teacher"] == teacher):
            group = [d for d in documents if (d["teacher"], d["recipe"]) == (teacher, recipe)]
            by_steps = group[0]["results"].get("student_by_steps", {})
            own = numbers(group, "student", "nfe")
            if own and not any(row.get("nfe") == own[0] for row in by_steps.values()):
                rows.append(_row(group, ("student",), f"{own[0]:.0f}", documents))
            for steps, row in by_steps.items():
                path = ("student_by_steps", steps)
                rows.append(_row(group, path, f"{row.get('nfe', steps)}", documents))
        runs = [d for d in documents if d["teacher"] == teacher]
        metric = distance(runs)
        header = tuple(metric if name == "fd_mini" else name for name in HEADER)
        if metric == "fvd_mini":
            at = header.index("seeds") + 1
            header = (*header[:at], *CLIPS, *header[at:])
        lines += ["", f"### {teacher}", "", *_real(runs), *markdown(header, rows)]
    return "\n".join(lines)
