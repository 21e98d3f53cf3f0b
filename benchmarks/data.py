"""What a folder of 200,000 pictures costs that is read as training goes: time to the first step, memory, and
how long a step waits for its batch.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
TEACHER = "assets:teachers/fashion"
STEPS = 30
DISTINCT = 500
"""pictures that differ; each is written to many files"""


def data(num: int = 200_000) -> dict:
    """A folder of num pictures by class, in a process of its own: seconds and memory, the libraries'
    included; and the same steps on the bundled set, which is in memory.
    """
    found: dict = {"num_images": num, "teacher": TEACHER, "clock": "wall and CPU, one thread"}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), num)
        for name, words in (("streamed", ["--images", folder]), ("in_memory", [])):
            out = subprocess.run(
                [sys.executable, "-m", "benchmarks.data", *words], cwd=ROOT, capture_output=True, text=True
            )
            assert out.returncode == 0, out.stderr
            found[name] = json.loads(out.stdout.splitlines()[-1])
    return found


def table(found: dict) -> str:
    """The part of docs/data.md that says what was measured."""
    streamed, kept = found["streamed"], found["in_memory"]
    rows = [
        ("first step after the start of the process, CPU seconds", "first_step_cpu_seconds"),
        ("the same on the wall, where other work shares the machine, s", "first_step_seconds"),
        ("peak memory of the process, MB", "peak_megabytes"),
        ("a step, s", "step_seconds"),
    ]
    lines = [f"| {what} | {streamed[key]:g} | {kept[key]:g} |" for what, key in rows]
    waits = (f"{one['wait_share']:.1%}" for one in (streamed, kept))
    return "\n".join(
        [
            f"| consistency distillation of {found['teacher']} "
            f"| {found['num_images']:,} pictures, streamed | the bundled set, in memory |",
            "|---|---|---|",
            *lines,
            f"| share of a step that waits for its batch | {' | '.join(waits)} |",
            "",
            "By `python -m benchmarks data --write`, kept in `assets/results/benchmarks/data.json`.",
        ]
    )


def write_pictures(folder: Path, num: int) -> None:
    """Grey 32 x 32 PNGs of the bundled fashion set, in a folder for each class."""
    from PIL import Image

    from fastgen.data.bundled import GARMENTS, load_images

    images = load_images("fashion").images[:DISTINCT, 0].numpy()
    files: list[bytes] = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        files.append(buffer.getvalue())
    for name in GARMENTS:
        (folder / name).mkdir()
    for i in range(num):
        (folder / GARMENTS[i % 10] / f"{i}.png").write_bytes(files[i % len(files)])


def steps(images: str) -> dict:
    """The first steps of a consistency distillation, from the start of this process on."""
    import psutil
    import torch

    from benchmarks.timing import ready_trainer

    torch.set_num_threads(1)
    started = psutil.Process().create_time()
    before = time.time() - started, peak_bytes() / 1e6
    source = {"images": images} if images else {"name": "fashion"}
    trainer, windows = ready_trainer(
        {
            "teacher": {"path": TEACHER},
            "data": source,
            "objective": {"name": "consistency"},
            "train": {"train_batch_size": 32, "validation_steps": 0, "checkpointing_steps": 0},
        }
    )
    ready = time.time() - started
    waits, whole = [], []
    for k in range(STEPS + 1):
        begin = time.perf_counter()
        batch = next(windows)[0]
        waits.append(time.perf_counter() - begin)
        trainer._micro_step(batch, k, 0, 10_000)
        whole.append(time.perf_counter() - begin)
        if k == 0:
            first = time.time() - started, time.process_time()
    windows.close()
    return {
        "libraries_seconds": round(before[0], 1),
        "loaded_seconds": round(ready, 1),
        "first_step_seconds": round(first[0], 1),
        "first_step_cpu_seconds": round(first[1], 1),
        "libraries_megabytes": round(before[1]),
        "peak_megabytes": round(peak_bytes() / 1e6),
        "step_seconds": round(sum(whole[1:]) / STEPS, 4),
        "wait_share": round(sum(waits[1:]) / sum(whole[1:]), 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default="")
    print(json.dumps(steps(parser.parse_args().images)))
