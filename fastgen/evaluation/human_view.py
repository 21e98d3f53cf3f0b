"""Sets of images for people to look at: side by side, and as a blind page of pairs that takes votes.

The blind page shows one pair at a time, each on a side drawn from the seed and in an order drawn from it. It
holds no name and no side: those are in key.json, which `fastgen.evaluation.votes` reads with the votes.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.evaluation.pages import render
from fastgen.evaluation.prompts import prompts_of
from fastgen.evaluation.report_pictures import uri
from fastgen.evaluation.sources import Folder, Source

LOSSLESS = 256
"""pixels: images up to this width are shown as they are, larger ones as JPEG of quality 95"""
KEY_FORMAT = 1


@dataclass
class Shown:
    """Images [N, 3, H, W] of each set that belong together, row by row, and the prompt of each row."""

    names: list[str]
    images: list[Tensor]
    prompts: list[str]
    rows: list[int]
    """number of each row in its set"""


def shown(names: list[str], sources: list[Source], prompts_file: str, num: int, seed: int) -> Shown:
    """num rows of sets that pair (all where there are no more), drawn by the seed and kept in order."""
    check_pairs(names, sources)
    prompts = _prompts(names, sources, prompts_file)
    total = len(sources[0])
    rows = sorted(random.Random(seed).sample(range(total), min(num, total)))
    return Shown(names, [_chosen(s, rows) for s in sources], [prompts[i] for i in rows], rows)


def check_pairs(names: list[str], sources: list[Source]) -> None:
    """Refuse sets whose images do not belong together one by one."""
    first = sources[0]
    for name, source in zip(names[1:], sources[1:]):
        if isinstance(first, Folder) and isinstance(source, Folder):
            _check_files(names[0], first, name, source)
        if len(source) != len(first):
            found = f"{name} holds {len(source)} images, {names[0]} {len(first)}"
            raise UserError("sets", found, "give sets of the same requests, an image each")


def _check_files(name: str, one: Folder, other_name: str, other: Folder) -> None:
    """Where two folders share names of files, a name that one of them lacks is a missing picture."""
    a, b = [{p.name for p in folder.files} for folder in (one, other)]
    if not a & b or a == b:
        return
    lacks, missing = (other_name, sorted(a - b)) if a - b else (name, sorted(b - a))
    found = f"{lacks} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    raise UserError("sets", found, "give sets of the same requests, or draw the missing ones")


def _prompts(names: list[str], sources: list[Source], file: str) -> list[str]:
    """The prompt of each image; refused where two sets say they are of different ones."""
    said = [prompts_of(source, file) for source in (sources[:1] if file else sources)]
    known = [(name, texts) for name, texts in zip(names, said) if texts is not None]
    for name, texts in known[1:]:
        first_name, first = known[0]
        row = next((i for i, (a, b) in enumerate(zip(first, texts)) if a != b), None)
        if row is not None:
            found = f"image {row} is of {first[row][:40]!r} in {first_name}, of {texts[row][:40]!r} in {name}"
            raise UserError("sets", found, "give sets of the same prompts in the same order")
    return known[0][1] if known else [""] * len(sources[0])


def _chosen(source: Source, rows: list[int]) -> Tensor:
    wanted, kept, first = set(rows), [], 0
    for batch in source.batches():
        kept += [image for i, image in enumerate(batch, first) if i in wanted]
        first += len(batch)
    return torch.stack(kept)


def picture(image: Tensor) -> str:
    """A data address of an image uint8 [3, H, W], without anything else that a file might say."""
    from fastgen.data.media import to_pil

    buffer = io.BytesIO()
    if image.shape[-1] <= LOSSLESS:
        kind = "png"
        to_pil(image.float() / 255).save(buffer, format="PNG")
    else:
        kind = "jpeg"
        to_pil(image.float() / 255).save(buffer, format="JPEG", quality=95, subsampling=0)
    return uri(buffer.getvalue(), kind)


def side_by_side(sets: Shown) -> str:
    """HTML: a row a request, a column a set."""
    rows = [
        {"number": sets.rows[i], "prompt": sets.prompts[i], "images": [picture(x[i]) for x in sets.images]}
        for i in range(len(sets.rows))
    ]
    return render("side_by_side.html.j2", names=sets.names, rows=rows)


def pairs_of(sets: Shown, seed: int) -> list[dict[str, Any]]:
    """Every row with every two sets, in an order and on sides drawn from the seed: left and right are the
    numbers of sets, row the place among the rows shown.
    """
    drawn = random.Random(f"sides {seed}")
    found: list[dict[str, Any]] = []
    for a, b in combinations(range(len(sets.names)), 2):
        for row in range(len(sets.rows)):
            left, right = (a, b) if drawn.random() < 0.5 else (b, a)
            found.append({"row": row, "left": left, "right": right})
    drawn.shuffle(found)
    return found


def blind(sets: Shown, seed: int) -> tuple[str, dict[str, Any]]:
    """(the blind page, what its key file holds)."""
    pairs = pairs_of(sets, seed)
    digest = hashlib.sha256(json.dumps([sets.names, sets.prompts, sets.rows, pairs, seed]).encode())
    for images in sets.images:
        digest.update(images.contiguous().numpy().tobytes())
    page = digest.hexdigest()[:16]
    shown_pairs = [
        {
            "prompt": sets.prompts[p["row"]],
            "left": picture(sets.images[p["left"]][p["row"]]),
            "right": picture(sets.images[p["right"]][p["row"]]),
        }
        for p in pairs
    ]
    key = {
        "format": KEY_FORMAT,
        "page": page,
        "seed": seed,
        "sets": sets.names,
        "pairs": [
            {
                "image": sets.rows[p["row"]],
                "prompt": sets.prompts[p["row"]],
                "left": sets.names[p["left"]],
                "right": sets.names[p["right"]],
            }
            for p in pairs
        ],
    }
    return render("blind.html.j2", page=page, pairs=shown_pairs), key
