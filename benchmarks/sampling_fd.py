"""Ten thousand one-step images of a mini and their fd_mini: seconds on one thread, and peak memory.

Images go from the generator through the measuring net into a mean and a covariance batch by batch, so that
memory does not grow with their number: the peak at a tenth of them is measured beside it.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.timing import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
NUM, MODEL = 10_000, "assets:teachers/fashion"


def fd() -> dict:
    """Processor seconds of drawing and measuring, and peak megabytes at all and at a tenth of the images."""
    found = _child(NUM)
    return found | {"peak_mb_of_a_tenth": _child(NUM // 10)["peak_mb"]}


def _child(num: int) -> dict:
    code = f"from benchmarks.sampling_fd import child; child({num})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.strip().splitlines()[-1])


def child(num: int) -> None:
    """One JSON line."""
    import torch

    from fastgen.cli.generate import Drawing, Request
    from fastgen.evaluation.metrics.fd_mini import Measurer
    from fastgen.evaluation.metrics.frechet import Moments, frechet_from

    torch.set_num_threads(1)
    drawing = Drawing(Request(MODEL, num, steps=1, guidance=1.0, batch_size=100))
    measurer, moments = Measurer("fashion"), Moments()
    real = measurer.real()
    start, wall = time.process_time(), time.monotonic()
    drawn = 0.0
    for first in range(0, num, 100):
        before = time.process_time()
        images = drawing.batch(first)
        drawn += time.process_time() - before
        moments.add(measurer.features(images))
    own = moments.statistics()
    value = frechet_from(own.mean, own.cov, *real)
    found = {"seconds": time.process_time() - start, "drawing_seconds": drawn, "fd_mini": value}
    found |= {
        "wall_seconds": time.monotonic() - wall,
        "peak_mb": peak_bytes() / 2**20,
        "images": num,
        "threads": 1,
    }
    print(json.dumps(found))
