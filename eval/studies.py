"""Tables of docs/methods.md on what students can do beside being fast, from the evidence and the studies in
assets/results/benchmarks/.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from eval.evidence import results_folder
from eval.results_table import cell, markdown, numbers


def _studies(name: str, folder: Path | None = None) -> Iterator[dict]:
    """The records of one study, by run."""
    for file in sorted(((folder or results_folder()) / "benchmarks").glob(f"{name}_*.json")):
        yield json.loads(file.read_text())


def forgetting(documents: list[dict]) -> str:
    """What students of sfd have forgotten, and what it did to the rest; nothing forgotten first."""
    rows = []
    for recipe in dict.fromkeys(d["recipe"] for d in documents):
        group = [d for d in documents if d["recipe"] == recipe and numbers([d], "student", "forgotten")]
        if group:
            own = lambda key, digits="", scale=1.0, who="student", group=group: cell(  # noqa: E731
                numbers(group, who, key), digits, scale
            )
            rows.append(
                [
                    f"`{recipe}`",
                    own("forgotten", ".1f", 100),
                    own("forgotten", ".1f", 100, "teacher"),
                    own("fd_mini", ".3g"),
                    own("retained_accuracy", ".1f", 100),
                    own("unlearning_h", ".3f"),
                    str(len(group)),
                ]
            )
    header = ("recipe", "still shown %", "by the teacher %", "fd_mini of the rest", "rest as asked %", "H")
    return "\n".join(markdown((*header, "seeds"), rows)) if rows else "No evidence yet."


def diversity(_: list[dict], folder: Path | None = None) -> str:
    """Base model, student and hybrids: variety within a caption, quality, calls and seconds."""
    lines: list[str] = []
    for study in _studies("diversity", folder):
        student = study["contenders"]["student"]["seconds_per_sample"]
        rows = [
            [
                name,
                f"{row['nfe']}",
                f"{row['seconds_per_sample'] / student:.2f}",
                f"{row['distance']:.3f}",
                f"{row['vendi']:.2f}",
                f"{row['fd_mini']:.3g}",
                f"{100 * row['agreement']:.1f}",
            ]
            for name, row in study["contenders"].items()
        ]
        header = ("drawn by", "NFE", "time of the student's", "distance", "Vendi score", "fd_mini")
        lines += [f"`{study['model']}`, {study['images']} images of {study['captions']} captions:", ""]
        lines += [*markdown((*header, "agreement %"), rows), ""]
    return "\n".join(lines).rstrip() or "No study yet."


def transfer(_: list[dict], folder: Path | None = None) -> str:
    """Shares in the controlled colour, and otherwise as asked for, by strength of the LoRA."""
    lines: list[str] = []
    for study in _studies("transfer", folder):
        scales = list(dict.fromkeys(s for row in study["rates"].values() for s in row))
        rows = [[name, *(_pair(row.get(scale)) for scale in scales)] for name, row in study["rates"].items()]
        lines += [f"`{study['model']}`, {study['colour']}, {study['images']} images each:", ""]
        lines += [*markdown(("drawn by", *(f"at {s}" for s in scales)), rows), ""]
    return "\n".join(lines).rstrip() or "No study yet."


def _pair(row: dict | None) -> str:
    return f"{100 * row['coloured']:.0f} ({100 * row['otherwise_as_asked']:.0f})" if row else ""


def longer(_: list[dict], folder: Path | None = None) -> str:
    """Both halves of clips twice as long as trained, and what real clips score."""
    rows, last = [], None
    for study in _studies("longer", folder):
        halves = [("1", study["first"]), ("2", study["second"])]
        speed = f"{1 / study['seconds_per_frame']:.0f}"
        rows += [[f"`{study['model']}`", half, *_clip_cells(row), speed] for half, row in halves]
        last = study
    if last is None:
        return "No study yet."
    rows.append(["real clips", "", *_clip_cells(last["floor"]), ""])
    header = ("run", "half", "fvd_mini", "fd_mini", "as asked %", "colour %", "motion %", "pixels a frame")
    return "\n".join(markdown((*header, "frames a second"), rows))


def stages(documents: list[dict]) -> str:
    """What runs of several stages that validate clips measured where each stage ended."""
    rows = []
    for document in (d for d in documents if not d["seed"]):
        teacher = document["results"].get("teacher", {})
        ends = [one for one in document["results"].get("stages", ()) if "fvd_mini" in one]
        for one in ends:
            name = f"after `{one['objective']}`" if one["objective"] else "before"
            rows.append([f"`{document['recipe']}`", name, str(one["step"]), *_clip_cells(one)])
        if ends:
            rows.append([f"`{document['recipe']}`", "the teacher", "", *_clip_cells(teacher)])
    header = ("recipe", "", "step", "fvd_mini", "fd_mini", "as asked %", "colour %", "motion %")
    return "\n".join(markdown((*header, "pixels a frame"), rows)) if rows else "No evidence yet."


def look(_: list[dict], folder: Path | None = None) -> str:
    """What each student took over of a look, beside its teacher, real clips and the pictures."""
    rows, last = [], None
    for _, group in groupby(_studies("look", folder), lambda study: study["model"].partition("_")[0]):
        for last in group:
            taken = f"{100 * last['taken_over']:.0f}"
            rows.append([f"`{last['model']}`", *_look_cells(last["student"]), taken])
        rows.append(["the teacher", *_look_cells(last["teacher"]), ""])
    if last is None:
        return "No study yet."
    rows.append(["real clips", *_look_cells(last["floor"]), ""])
    rows.append(["the pictures", f"{last['pictures']['contrast']:.3f}", "", "", "", ""])
    header = ("run", "contrast", "motion %", "pixels a frame", "fvd_mini", "taken over %")
    return "\n".join(markdown(header, rows))


def _look_cells(row: dict) -> list[str]:
    motion, moved = f"{100 * row['agreement_motion']:.1f}", f"{row['dynamic_degree']:.2f}"
    return [f"{row['contrast']:.3f}", motion, moved, f"{row['fvd_mini']:.3g}"]


def _clip_cells(row: dict) -> list[str]:
    keys = ("agreement", "agreement_colour", "agreement_motion")
    shares = [f"{100 * row[key]:.1f}" if key in row else "" for key in keys]
    return [f"{row['fvd_mini']:.3g}", f"{row['fd_mini']:.3g}", *shares, f"{row['dynamic_degree']:.2f}"]


def relight(_: list[dict], folder: Path | None = None) -> str:
    """Materials of a scene whose truth is known, progressively and by plain inverse rendering."""
    rows = []
    for study in _studies("relight", folder):
        for name, seeds in study["measured"].items():
            own = lambda key, digits, seeds=seeds: cell([one[key] for one in seeds], digits)  # noqa: E731
            held_out = [
                own(f"psnr_{key}", ".1f") for key in ("blended", "model", "evening", "noon", "studio")
            ]
            rows.append([name, own("albedo_rmse", ".3f"), own("normal_degrees", ".1f"), *held_out])
    header = ("inverse rendering", "albedo error", "normals off by", "PSNR blended", "of the model alone")
    header = (*header, "under evening", "noon", "studio")
    return "\n".join(markdown(header, rows)) if rows else "No study yet."


def frontier(_: list[dict], folder: Path | None = None) -> str:
    """What the knob of a restoring student trades, beside its teacher and the enlarged pictures."""
    lines: list[str] = []
    for study in _studies("frontier", folder):
        rows = [
            [
                name,
                f"{row['nfe']}",
                f"{row['psnr']:.2f}",
                *([f"{row['ssim']:.3f}"] if "ssim" in row else []),  # none of pictures below its window
                f"{row['perceptual']:.3f}",
                f"{row['fd_mini']:.3g}",
                f"{row['variance']:.3f}",
                f"{100 * row['agreement']:.1f}",
            ]
            for name, row in study["contenders"].items()
        ]
        own = ("SSIM",) if "ssim" in next(iter(study["contenders"].values())) else ()
        header = ("drawn by", "NFE", "PSNR", *own, "perceptual", "fd_mini", "variance", "agreement %")
        lines += [f"`{study['model']}`, {study['images']} held-out pictures of {study['set']} enlarged "]
        lines[-1] += f"{study['factor']} times:"
        lines += ["", *markdown(header, rows), ""]
    return "\n".join(lines).rstrip() or "No study yet."


TABLES = {
    "forgetting": forgetting,
    "diversity": diversity,
    "transfer": transfer,
    "longer": longer,
    "stages": stages,
    "look": look,
    "relight": relight,
    "frontier": frontier,
}
