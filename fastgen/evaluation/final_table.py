"""What a run's measurements look like in a terminal, and the card that a trained denoiser carries."""

from fastgen.evaluation.reconstruction import NAMES

MOST_WIDTH = 100
"""characters of a line of the final table"""


def table(results: dict) -> str:
    """One line each: teacher, untrained student, student (at every step count measured), real images."""
    first, last = (
        (
            "fvd_mini",
            "fd_mini",
            *NAMES.values(),
            "energy_distance",
            "chamfer",
            "jsd",
            "jsd_bev",
            "iou",
            "f_score",
            "agreement",
            "agreement_motion",
            "psnr",
            "ssim",
            "forgotten",
            "recall",
            "clip",
            "dynamic_degree",
        ),
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
    rows += [("bicubic", results["enlarged"])] if "enlarged" in results else []
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
