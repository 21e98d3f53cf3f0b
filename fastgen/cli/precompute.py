"""fastgen precompute --teacher TEACHER --data.images FOLDER --out FOLDER: encode images and prompts once.

Training then reads what is encoded (train.py --data.latents FOLDER) and loads no text encoder. What is named
under --data goes as in training: captions, classes, tables, archives, several sources. The command can be
stopped at any time; run again, it makes what is missing. On several machines give each --part I/N.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from fastgen.core import interrupt
from fastgen.core.console import documented, exit_code, quiet
from fastgen.core.errors import UserError
from fastgen.core.paths import expand
from fastgen.core.threads import allowed_cpus


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen precompute`; 0, 2 for a user's mistake, 75 where a signal stopped it."""
    words = sys.argv[1:] if argv is None else argv
    with interrupt.handled():
        try:
            return exit_code(lambda: _main(words))
        except (interrupt.Stopped, KeyboardInterrupt):
            print("stopped; the same command makes what is missing", file=sys.stderr)
            return interrupt.REQUEUE


def _flags() -> argparse.ArgumentParser:
    flags = documented("fastgen precompute", __doc__)
    flags.add_argument("--teacher", default="", metavar="PATH", help="whose encoders are used")
    flags.add_argument("--out", default="", metavar="FOLDER", help="where the shards go")
    flags.add_argument("--config", nargs="+", default=[], metavar="YAML", help="files with teacher and data")
    flags.add_argument("--shard_size", type=int, default=1000, metavar="N", help="samples of a shard (1000)")
    flags.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of what is kept")
    flags.add_argument("--processes", type=int, default=1, metavar="N", help="on this machine (1)")
    flags.add_argument("--part", default="", metavar="I/N", help="make the I-th of N parts, from 0, alone")
    flags.add_argument("--device", default="", help="cpu, cuda, ...; by default a GPU where there is one")
    return flags


def _main(argv: list[str]) -> int:
    known, rest = _flags().parse_known_args(argv)
    quiet()
    part, parts = _part(known.part)
    for name, value in (("--shard_size", known.shard_size), ("--processes", known.processes)):
        if value < 1:
            raise UserError(name, f"found {value}", "give 1 or more")
    if not known.out:
        raise UserError("--out", "not given", "name a folder for the shards")
    if known.part and known.processes > 1:
        raise UserError("--processes", "found with --part", "give either")
    work = _prepared(known, rest)
    if known.processes > 1 and work.missing():
        _in_processes(argv, known.processes)
    else:
        from fastgen.data.precompute import Share

        work.make(Share(part, parts))
    if (count := work.end()) is not None:
        print(f"{count:,} samples in {work.shards} shards are in {work.out}")
        print(f"train on them  train.py ... --data.latents {work.out}")
    else:
        print(f"{len(work.missing())} of {work.shards} shards are left for the other parts")
    return 0


def _part(text: str) -> tuple[int, int]:
    if not text:
        return 0, 1
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError("--part", f"found {text[:40]!r}", "give I/N, such as 0/4 to 3/4")
    return int(part), int(parts)


def _prepared(known: argparse.Namespace, rest: list[str]):
    """The work, with the teacher loaded and the folder begun."""
    import torch

    from fastgen.config.parse import overrides, read_files
    from fastgen.config.recommended import find_teacher
    from fastgen.config.run import RunConfig, validate, with_flags
    from fastgen.core.threads import threads_per_process
    from fastgen.data.precompute import Precompute
    from fastgen.data.sources import check_there
    from fastgen.networks.device import open_device
    from fastgen.training.cast import load_configured

    given = read_files(known.config) if known.config else {}
    base = {key: value for key, value in given.items() if key in ("teacher", "data")}
    over = overrides(rest, RunConfig)
    if unused := [key for key in over if key not in ("teacher", "data")]:
        raise UserError(f"--{unused[0]}", "decides nothing here", "give keys of teacher and data")
    if known.teacher:
        over["teacher"] = over.get("teacher", {}) | {"path": find_teacher(known.teacher)[0]}
    if "path" not in over.get("teacher", {}) and "path" not in base.get("teacher", {}):
        raise UserError("--teacher", "not given", "name the teacher that will be distilled")
    cfg = validate({"objective": {"name": "swiftbrush"}, "data": {"name": ""}} | with_flags(base, over))
    check_there(cfg.data)
    torch.set_num_threads(threads_per_process(0, torch.get_num_threads()))
    device = open_device(known.device)
    teacher = load_configured(cfg.teacher, device)
    out = Path(expand(known.out))
    work = Precompute(cfg.data, teacher, out, known.shard_size, known.dtype, device)
    work.begin()
    return work


def _in_processes(argv: list[str], num: int) -> None:
    """Run this command in num processes, each with its part; if one fails the others end too."""
    words = _without_processes(argv)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, allowed_cpus() // num))
    quiet_ones = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": threads}
    children: list[subprocess.Popen] = []
    try:
        for i in range(num):
            command = [sys.executable, "-m", "fastgen", "precompute", *words, "--part", f"{i}/{num}"]
            own = {} if i == 0 else quiet_ones
            env = os.environ | {"OMP_NUM_THREADS": threads} | own
            children.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL))
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):  # it has said why
                break
            time.sleep(0.1)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
            child.wait()
    if code := next((child.returncode for child in children if child.returncode), 0):
        raise UserError("--processes", f"a process ended with code {code}", "see the line above")


def _without_processes(argv: list[str]) -> list[str]:
    words, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] != "--processes":
            words.append(word)
        skip = word == "--processes"
    return words
