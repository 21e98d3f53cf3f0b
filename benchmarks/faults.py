"""Attacks on whole commands, counted: how many were tried, and how many held.

Bad inputs must end in one line and exit code 2 (or be accepted, where they may be right). A damaged
checkpoint must be refused in one line, or the run must end with the weights of an undisturbed one; so must a
run that was killed at a random moment or stopped by a signal, once it is resumed.

Each command runs in a process forked from this one, so that the libraries are imported once.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.fault_inputs import Attack, bad_inputs, damages
from benchmarks.page import put

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "assets/teachers/digits"
SECONDS = 120
"""most that one command may take"""
FAST = """\
teacher: {path: "assets:teachers/digits", num_steps: 2}
objective: {name: dmd2, student_every: 1, gan_weight: 0}
data: {name: digits, limit: 64}
train: {max_train_steps: 40, train_batch_size: 2, validation_steps: 0, checkpointing_steps: 2, num_threads: 1,
  checkpoints_total_limit: 9, ema_decay: [0.9], log_steps: 1}
eval: {num_samples: 0}
"""
SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1")
RIGHT = {
    "bad inputs": "one line naming the setting, exit code 2, no traceback",
    "damaged checkpoints": "refused in one line, or the weights of an undisturbed run",
    "kill -9 at random moments": "resumed, the weights of an undisturbed run, bit for bit",
    "signals": "a checkpoint at the next step, a message; resumed, the same weights",
}


class Command:
    """One command in a forked process, its output in a file."""

    def __init__(self, program: str, argv: list[str], log: Path):
        self.log = log
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_child(program, argv, log))

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Exit code (minus the number of a signal that ended it), or None where it still runs."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                break
            else:
                time.sleep(0.01)
        return self.code

    def send(self, number: int) -> None:
        """A signal, unless the command has ended."""
        if self.wait(0) is None:
            os.kill(self.pid, number)

    def finish(self) -> tuple[int | None, str]:
        """(exit code, output); a command that does not end is killed, and its code is None."""
        code = self.wait()
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        return code, self.log.read_text(errors="replace")


def _child(program: str, argv: list[str], log: Path) -> int:
    for name in SIGNALS:  # a shell's background and nohup have some of them ignored
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        code = _main(program)(argv)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def _main(program: str) -> Callable[[list[str]], int]:
    from fastgen.cli import sample, train

    return {"train": train.main, "sample": sample.main}[program]


def verdict(attack: Attack, code: int | None, output: str) -> str:
    """What was wrong with the end of a command, or an empty text."""
    errors = [line for line in output.replace("\r", "\n").splitlines() if "error: " in line]
    if "Traceback" in output:
        return "a traceback: " + output.strip().splitlines()[-1][:120]
    if code is None:
        return f"still running after {SECONDS} s"
    if code == 0 and attack.may_pass:
        return ""
    return "" if code == 2 and len(errors) == 1 else f"exit code {code}, {len(errors)} lines with error:"


def inputs(folder: Path, num: int) -> Iterator[tuple[str, str]]:
    """(attack, what failed) of every num-th bad input."""
    for attack in list(bad_inputs(folder, TEACHER))[::num]:
        attack.prepare()
        code, output = Command(attack.command, attack.argv, folder / "log").finish()
        yield attack.name, verdict(attack, code, output)
        for left in ("out", "run"):
            shutil.rmtree(folder / left, ignore_errors=True)


def train(folder: Path, run: Path, *more: str) -> Command:
    argv = ["--config", str(folder / "fast.yaml"), "--output_dir", str(run), *more]
    return Command("train", argv, folder / "log")


def same(run: Path, wanted: Path) -> str:
    """How a run's last checkpoint differs from an undisturbed run's, or an empty text."""
    import torch
    from safetensors.torch import load_file

    found = run / "checkpoints" / wanted.name / "state.safetensors"
    if not found.is_file():
        return f"no {wanted.name}"
    a, b = load_file(found), load_file(wanted / "state.safetensors")
    return "" if a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) else "other weights"


def undisturbed(folder: Path) -> tuple[Path, float]:
    """(last checkpoint of a run that nothing disturbs, its seconds)."""
    start = time.monotonic()
    code, output = train(folder, folder / "whole").finish()
    assert code == 0, output
    seconds = time.monotonic() - start
    return max((folder / "whole/checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1])), seconds


def resumed(folder: Path, run: Path, wanted: Path) -> str:
    """Resume a run (or start it where it has no checkpoint), and compare its end."""
    has = any((run / "checkpoints").glob("checkpoint-*[0-9]"))
    flags = ["--resume"] if has else ["--overwrite"] if run.exists() else []
    code, output = train(folder, run, *flags).finish()
    if code:
        return f"exit code {code}: {output.strip().splitlines()[-1][:120]}"
    return same(run, wanted)


def checkpoints(folder: Path, num: int) -> Iterator[tuple[str, str]]:
    wanted, _ = undisturbed(folder)
    run = folder / "damaged"
    before = wanted.with_name(f"checkpoint-{int(wanted.name.split('-')[1]) - 2}")
    for name in list(damages(before))[::num]:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(wanted.parents[1], run)
        shutil.rmtree(run / "checkpoints" / wanted.name)
        damages(run / "checkpoints" / before.name)[name]()
        code, output = train(folder, run, "--resume").finish()
        refused = Attack(name, "train", [])
        yield name, same(run, wanted) if code == 0 else verdict(refused, code, output)


def kills(folder: Path, num: int, times: int = 12) -> Iterator[tuple[str, str]]:
    wanted, seconds = undisturbed(folder)
    rng = random.Random(0)
    for i in range(-(-times // num)):
        run, after = folder / f"killed{i}", rng.uniform(0, seconds)
        command = train(folder, run)
        command.wait(after)
        command.send(signal.SIGKILL)
        command.finish()
        yield f"after {after:.2f} s", resumed(folder, run, wanted)


def signals(folder: Path, num: int) -> Iterator[tuple[str, str]]:
    wanted, seconds = undisturbed(folder)
    for i, name in enumerate((*SIGNALS, *SIGNALS)[::num]):
        run = folder / f"stopped{i}"
        command = train(folder, run, "--train.checkpointing_steps", "0")
        end = time.monotonic() + SECONDS
        while not (run / "metrics.jsonl").exists() and command.wait(0) is None and time.monotonic() < end:
            time.sleep(0.01)
        command.send(getattr(signal, name))
        code, output = command.finish()
        if code == 0:
            yield name, "the run went on to its end"
        elif "Traceback" in output or not any((run / "checkpoints").glob("checkpoint-*")):
            yield name, f"exit code {code}, no checkpoint" if "Traceback" not in output else "a traceback"
        else:
            yield name, resumed(folder, run, wanted)


def import_libraries() -> None:
    """Import in this process what a run imports, so that the forked ones need not."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "fast.yaml").write_text(FAST)
        for program in ("train", "sample"):
            _main(program)
        run = ["--output_dir", str(folder / "run"), "--max_steps", "1"]
        _main("train")(["--config", str(folder / "fast.yaml"), *run])


KINDS = {
    "bad inputs": inputs,
    "damaged checkpoints": checkpoints,
    "kill -9 at random moments": kills,
    "signals": signals,
}


def faults(every: int = 1) -> dict:
    """Figures of each kind; `every` tries every n-th attack only."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
    found: dict = {}
    import_libraries()
    for kind, attacks in KINDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "fast.yaml").write_text(FAST)
            start, ended = time.monotonic(), []
            for name, wrong in attacks(folder, every):
                ended.append((name, wrong))
                if wrong:
                    print(f"{kind}: {name}: {wrong}", file=sys.stderr, flush=True)
            failed = [f"{name}: {wrong.replace(scratch, '')}" for name, wrong in ended if wrong]
        found[kind] = {"tried": len(ended), "held": len(ended) - len(failed), "failed": failed}
        found[kind]["seconds"] = round(time.monotonic() - start)
    if every == 1:
        put("faults", page(found))
    return found


def page(found: dict) -> str:
    """The table of docs/reliability.md."""
    lines = ["| attack | tried | held | right behaviour |", "|---|---|---|---|"]
    lines += [f"| {k} | {v['tried']} | {v['held']} | {RIGHT[k]} |" for k, v in found.items()]
    failed = [f"{kind}: {line}" for kind, v in found.items() for line in v["failed"]]
    lines += ["", "Did not hold:" if failed else "All held.", ""]
    escaped = (line.replace("|", "\\|").replace("<", "&lt;") for line in failed)
    return "\n".join([*lines, *(f"- {line}" for line in escaped)])
