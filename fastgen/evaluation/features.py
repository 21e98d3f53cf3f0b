"""Outputs of an encoder for the images of a source: computed in batches, kept on disk where a cache is given,
and statistics files of reference sets.

A cached file is named by the encoder's key (its weights and preprocessing) and the checksum of the images,
so a file of another encoder or other images is never taken. Its header says the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.core.errors import UserError, warn
from fastgen.core.files import placed, write_tensors
from fastgen.evaluation.encoders.base import Encoder, Outputs
from fastgen.evaluation.metrics.distributions import named
from fastgen.evaluation.metrics.frechet import Moments, Statistics
from fastgen.evaluation.sources import BATCH, Source

HEADER = "fastgen_features"


def computed(encoder: Encoder, source: Source, batch_size: int = BATCH) -> Iterator[Outputs]:
    """Outputs of each batch; a UserError that names the encoder where they are not finite."""
    first = 0
    for batch in source.batches(batch_size):
        found = encoder(batch)
        for name, value in found.items():
            bad = (~value.isfinite().all(1)).nonzero().flatten()
            if len(bad):
                where = f"image {first + int(bad[0])} of {source.name}"
                wrong = f"{name} of {encoder.name} are not finite for {len(bad)} images, the first {where}"
                raise UserError(source.key, wrong, "look at that image, or use float32 weights")
        first += len(batch)
        yield found


def outputs(encoder: Encoder, source: Source, cache: Path | None = None, keep: str = "") -> Outputs:
    """All of a source, [N, d] each; `keep` is the beginning of the names that are held in memory."""
    if cache and cache.exists() and not cache.is_dir():
        raise UserError("--cache", f"{cache} is a file", "give a folder")
    file = cache / f"{encoder.key}-{source.digest()[:16]}.safetensors" if cache else None
    if file and file.is_file():
        return _cached(file, encoder, len(source))
    found: Outputs = {}
    first = 0
    for batch in computed(encoder, source):
        for name, value in batch.items():
            if file or name.startswith(keep):
                if name not in found:  # one piece from the start: joining at the end takes twice the memory
                    found[name] = torch.empty(len(source), value.shape[1])
                found[name][first : first + len(value)] = value
        first += len(next(iter(batch.values())))
    if file:
        write_tensors(file, found, {HEADER: json.dumps(_about(encoder, source, first))})
    return found


def _about(encoder: Encoder, source: Source, num: int) -> dict:
    return {**encoder.describe(), "key": encoder.key, "images": source.digest(), "num": num}


def _cached(file: Path, encoder: Encoder, num: int) -> Outputs:
    """What a cached file holds; refused where it is of another encoder or count."""
    from safetensors import safe_open

    remedy = "delete it, or give another --cache"
    try:
        with safe_open(file, "pt") as reader:
            header = json.loads((reader.metadata() or {})[HEADER])
            found = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:
        raise UserError("--cache", f"{file} cannot be read ({error})", remedy) from None
    if header.get("key") != encoder.key:
        raise UserError("--cache", f"{file} was made with another encoder ({header.get('encoder')})", remedy)
    if any(len(v) != num or not v.isfinite().all() for v in found.values()):
        raise UserError("--cache", f"{file} does not hold {num} finite rows", remedy)
    return found


# -- statistics files
def statistics(encoder: Encoder, source: Source) -> Statistics:
    """Mean and covariance of a source's features, in memory of d x d."""
    moments = Moments()
    for batch in computed(encoder, source):
        moments.add(named(batch, "features", encoder.name))
    if moments.num < 2:
        raise UserError(
            source.key, f"{source.name} holds one image", "give two or more: a covariance needs them"
        )
    return moments.statistics()


def write_statistics(path: Path, found: Statistics, encoder: Encoder, source: Source) -> None:
    """An npz in EDM's layout (mu, sigma) that also says what it is of."""
    about = _about(encoder, source, found.num)
    with placed(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=found.mean.numpy(), sigma=found.cov.numpy(), fastgen=np.array(json.dumps(about)))


def read_statistics(path: Path, encoder: Encoder | None, key: str = "--against") -> Statistics:
    """From ours, EDM's, ADM's, pytorch-fid's or clean-fid's layout: mu [d] and sigma [d, d].

    Only ours says which encoder it is of; others are taken for the encoder that is asked, and this is told.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, cov = (torch.from_numpy(np.asarray(file[k], dtype=np.float64)) for k in ("mu", "sigma"))
            about = json.loads(str(file["fastgen"])) if "fastgen" in file.files else {}
    except KeyError:
        raise UserError(
            key, f"{path} has no mu and sigma", "give a statistics file, or images in arr_0"
        ) from None
    except Exception as error:
        raise UserError(key, f"{path} cannot be read ({error})", "give an npz file without pickles") from None
    mean = mean.flatten()
    if cov.shape != (len(mean), len(mean)) or not (mean.isfinite().all() and cov.isfinite().all()):
        found = f"{path}: mu {list(mean.shape)} and sigma {list(cov.shape)}"
        raise UserError(key, found, "give finite mu [d] and sigma [d, d]")
    if about and encoder and about.get("key") != encoder.key:
        made = f"{about.get('encoder')} ({about.get('resize')}, weights {about.get('weights_sha256')})"
        asked = f"{encoder.name} ({encoder.preprocessing}, weights {encoder.weights[:12]})"
        raise UserError(
            key, f"{path} was made with {made}, not {asked}", "make it again with `fastgen-eval statistics`"
        )
    if not about and encoder:
        warn(f"{key}: {path} does not say its encoder; taken for {encoder.name}, {encoder.preprocessing}")
    return Statistics(mean, cov, int(about.get("num", 0)))


def _names(path: Path) -> set[str]:
    """Arrays of an npz file; none where it is no such file."""
    if path.suffix != ".npz" or not path.is_file():
        return set()
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(file.files)
    except Exception:
        return set()


def is_statistics(path: Path) -> bool:
    """Whether a file holds a mean and a covariance; ADM's hold images beside them."""
    return {"mu", "sigma"} <= _names(path)


def holds_images(path: Path) -> bool:
    """Whether an npz file holds images."""
    return "arr_0" in _names(path)


def check_width(features: Tensor, reference: Statistics, encoder: Encoder, key: str = "--against") -> None:
    """Refuse statistics of another number of features."""
    if features.shape[1] != len(reference.mean):
        found = f"statistics of {len(reference.mean)} features for an encoder of {features.shape[1]}"
        raise UserError(key, found, f"give those of {encoder.name}")
