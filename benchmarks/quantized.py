"""Adapters trained over a quantised base, measured over that base and over the full one that users have."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs/recipes/tinted-sana_lcm.yaml"
NAMES = ("fd_mini", "agreement")


def quantized(steps: int = 300, num_samples: int = 500) -> dict:
    """fd_mini and agreement of one LCM adapter of the SANA mini, by what its base was stored as while it
    trained: sampled over that base, and exported and sampled over the full weights.
    """
    found: dict = {"recipe": RECIPE.stem, "steps": steps, "num_samples": num_samples}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("null", "int8", "nf4"):
            run = Path(folder) / kind
            train = [f"--config={RECIPE}", "--teacher.quantization", kind, "--output_dir", str(run)]
            train += ["--train.max_train_steps", str(steps), "--eval.num_samples", str(num_samples)]
            train += ["--eval.teacher_samples", "100", "--eval.student_steps", "4"]
            _call("train.py", *train)
            own = _student(run)
            _call("-m", "eval", "--run", str(run))
            found["full" if kind == "null" else kind] = {"own_base": own, "full_base": _student(run)}
    return found


def _student(run: Path) -> dict:
    row = json.loads((run / "results.json").read_text())["student_by_steps"]["4"]
    return {name: row[name] for name in NAMES}


def _call(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
