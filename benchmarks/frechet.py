"""What a Frechet distance costs: 50,000 features of 2048 dimensions with the interval, and its matrix root
against scipy's.

The features are held in memory as float32 (400 MB), as after an encoder; their covariance is of full rank.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.timing import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
NUM, DIM, CHUNK = 50_000, 2048, 2000


def frechet() -> dict:
    """Processor seconds (two threads count double) and peak megabytes of a FID of 50,000 images and of its
    interval, in a process of its own.
    """
    code = "from benchmarks.frechet import child; child()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.strip().splitlines()[-1])


def _features(num: int, seed: int):
    """[num, DIM] of decaying variances, float32, made in chunks."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, DIM + 1) ** -0.5
    made = torch.empty(num, DIM)
    for first in range(0, num, CHUNK):
        rows = min(CHUNK, num - first)
        made[first : first + rows] = torch.randn(rows, DIM, generator=generator) * scale + 0.01 * seed
    return made


def child() -> None:
    """One JSON line: seconds by part, and the process's peak."""
    import torch

    from fastgen.evaluation.metrics.frechet import frechet_estimate, statistics_of

    torch.set_num_threads(2)
    features = _features(NUM, 1)
    reference = statistics_of(_features(CHUNK, 0) for _ in range(2))
    start = time.process_time()
    estimate = frechet_estimate(features, reference)
    middle, peak = time.process_time(), peak_bytes() / 2**20
    estimate.interval()
    found = {"fid_seconds": middle - start, "interval_seconds": time.process_time() - middle}
    found |= {"fid_peak_mb": peak, "interval_peak_mb": peak_bytes() / 2**20}
    print(json.dumps({**found, "features": NUM, "dimensions": DIM, "threads": 2}))


def sqrtm() -> dict:
    """Processor seconds of the distance of two Gaussians of 2048 dimensions, here and by scipy's sqrtm."""
    import torch
    from scipy import linalg

    from fastgen.evaluation.metrics.frechet import frechet_from, statistics_of

    torch.set_num_threads(2)
    a, b = (statistics_of([_features(3 * DIM, seed)]) for seed in (0, 1))
    start = time.process_time()
    ours = frechet_from(a.mean, a.cov, b.mean, b.cov)
    middle = time.process_time()
    root = linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real
    theirs = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * root.trace()
    return {
        "gaussians_seconds": middle - start,
        "sqrtm_seconds": time.process_time() - middle,
        "relative_difference": f"{abs(ours - theirs) / theirs:.1e}",
    }
