"""The prompt or label of each image: a line of a file each, or what the source has beside its images."""

from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError, warn
from fastgen.core.reading import read_json
from fastgen.data.text import read_text, split_lines
from fastgen.evaluation.sources import Folder, Source

SAMPLES = "samples.json"
"""written beside its pictures by sample.py, which goes round its prompts"""
MOST_BYTES = 2**30
"""of it: a million images"""


def read_prompts(
    file: str | Path, num: int, drawn: bool = False, key: str = "--prompts", group_size: int = 1
) -> list[str]:
    """The line of each of num images: as many lines as images, blank ones in their places.

    Fewer lines are repeated in turn where they divide the images, or where sample.py has `drawn` them, each
    for `group_size` images that follow each other; other counts are refused.
    """
    text = read_text(file, key, "a text file with one prompt or label a line")
    lines = split_lines(text)
    filled = [line for line in lines if line]
    if not filled:
        raise UserError(key, f"{file} is empty", "write one prompt or label per line")
    while lines[-1] == "" and len(lines) > num:
        lines.pop()
    if len(lines) == num:
        return lines
    if len(filled) == num:
        return filled
    if drawn or (len(filled) < num and num % len(filled) == 0):
        warn(f"{key}: {len(filled)} lines for {num} images, repeated in order, as sample.py does")
        return [filled[i // max(1, group_size) % len(filled)] for i in range(num)]
    raise UserError(
        key, f"{len(lines)} lines in {file} for {num} images", "give one line per image, in the same order"
    )


def prompts_of(source: Source, file: str = "", group_size: int = 1) -> list[str] | None:
    """From the file, or else what sample.py, an archive or a bundled set says; None where nothing does."""
    drawn = isinstance(source, Folder) and (source.folder / SAMPLES).is_file()
    if file:
        return read_prompts(file, len(source), drawn, group_size=group_size)
    return _drawn(source) if drawn and isinstance(source, Folder) else source.captions


def _drawn(source: Folder) -> list[str] | None:
    """The conditions in samples.json, where it is about these very files."""
    images = read_json(source.folder / SAMPLES, "--images", limit=MOST_BYTES).get("images")
    said = {}
    for entry in images if isinstance(images, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            said[entry["file"]] = str(entry.get("condition", ""))
    names = [p.name for p in source.files]
    return [said[n] for n in names] if all(n in said for n in names) else None


def labels_of(source: Source, prompts: list[str] | None, mini_set: str = "") -> dict[str, Tensor]:
    """What each image should show, [N] by attribute: as the prompts ask of the mini set's images, as whole
    numbers, or the source's own labels. Empty where nothing says it.
    """
    if mini_set and prompts:
        from fastgen.evaluation.metrics.fd_mini import attributes_from

        return attributes_from(mini_set, prompts)
    if prompts and all(p.isdecimal() for p in prompts):
        return {"class": torch.tensor([int(p) for p in prompts])}
    return {"class": torch.tensor(source.labels)} if source.labels is not None else {}
