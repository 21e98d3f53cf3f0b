"""What a run needs to read and encode a hundred thousand prompts, in a process of its own."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
TEACHER = "assets:teachers/tinted-sd"
COLOURS = ("red", "green", "blue", "yellow", "grey", "white", "black", "pink")
THINGS = ("dress", "shirt", "boot", "bag", "coat", "sneaker", "sandal", "pullover", "trouser")


def prompts(num: int = 100_000) -> dict:
    """CPU seconds and peak memory of a whole process, the libraries' own included, that loads a teacher and
    its prompts: without a cache, while the cache is made, and from the cache.
    """
    found: dict = {"num_prompts": num, "teacher": TEACHER, "clock": "process time, one thread"}
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder) / "prompts.txt", Path(folder) / "cache"
        lines = (f"a {COLOURS[i % 8]} {THINGS[i % 9]} {i}" for i in range(num))
        file.write_text("\n".join(lines) + "\n")
        for name, kept in (("no_cache", ""), ("making_cache", cache), ("from_cache", cache)):
            command = [sys.executable, "-m", "benchmarks.prompts", str(file), "--cache_dir", str(kept)]
            out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert out.returncode == 0, out.stderr
            found[name] = json.loads(out.stdout.splitlines()[-1])
    return found


def load(file: str, cache_dir: str) -> dict:
    """What this process has needed once the prompts of a file are loaded, and before them."""
    import torch

    from fastgen.config.run import validate
    from fastgen.data.loader import load_data
    from fastgen.networks.load import load_teacher

    torch.set_num_threads(1)
    objective = {"name": "dmd2", "gan_weight": 0.0}
    values = {"teacher": {"path": TEACHER}, "objective": objective}
    cfg = validate({**values, "data": {"prompts": file, "cache_dir": cache_dir}})
    teacher = load_teacher(TEACHER)
    before = _needed()
    data = load_data(cfg.data, teacher)
    table = sum(v.numel() * v.element_size() for v in data.cond_table.values())
    return {**_needed(), "before_the_prompts": before, "table_megabytes": round(table / 1e6)}


def _needed() -> dict:
    return {"cpu_seconds": round(time.process_time(), 1), "peak_megabytes": round(peak_bytes() / 1e6)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--cache_dir", default="")
    arguments = parser.parse_args()
    print(json.dumps(load(arguments.file, arguments.cache_dir)))
