"""Scripts run in plain diffusers, where fastgen cannot be imported, without starting Python anew for each.

`python tests/support/plain.py` is the process that runs them: it imports torch and diffusers once, bars
fastgen, and forks for every script. `run_plain` is what tests call.
"""

import atexit
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

_server: subprocess.Popen | None = None


def run_plain(script, *arguments, cwd) -> SimpleNamespace:
    """(returncode, stderr) of a script run in the folder cwd."""
    global _server
    if _server is None or _server.poll() is not None:
        environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        _server = subprocess.Popen([sys.executable, str(Path(__file__).resolve())], cwd="/", **pipes)
        atexit.register(_server.kill)
    job = {"script": str(script), "arguments": [str(a) for a in arguments], "cwd": str(cwd)}
    try:
        _server.stdin.write(json.dumps(job) + "\n")
        _server.stdin.flush()
        return SimpleNamespace(**json.loads(_server.stdout.readline()))
    except BaseException:  # out of time: its answer must not be read as that of the next script
        _server.kill()
        _server = None
        raise


class Barred:
    """Import hook that refuses fastgen."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastgen":
            raise ImportError("fastgen may not be imported here")


def child(job: dict, log: int) -> int:
    """Run one script as `python script arguments` would."""
    import runpy

    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(job["cwd"])
    sys.argv, sys.path[0] = [job["script"], *job["arguments"]], job["cwd"]
    try:
        runpy.run_path(job["script"], run_name="__main__")
        assert "fastgen" not in sys.modules
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """Answer jobs from stdin until it closes."""
    import tempfile

    sys.meta_path.insert(0, Barred())
    import torch
    from diffusers import SanaPipeline, StableDiffusionPipeline  # noqa: F401  (and transformers with them)

    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as log:
            pid = os.fork()
            if not pid:
                os._exit(child(json.loads(line), log.fileno()))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            log.seek(0)
            message = log.read().decode(errors="replace")[-3000:]
        print(json.dumps({"returncode": code, "stderr": message}), flush=True)


if __name__ == "__main__":
    serve()
