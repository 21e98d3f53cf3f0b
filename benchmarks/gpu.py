"""Everything that needs a card, in one run of at most eight minutes and without a download.

  python -m benchmarks gpu --write         on a card: into assets/results/gpu/
  python -m benchmarks gpu --tiny          the same calls on a CPU, to see that they all end

Each check is a process of its own, or a call that is short; what there is no time left for is named as such.
Full-size networks have random weights (benchmarks/real_size.py).
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.real_size import ROOT, in_a_process, wait
from fastgen.networks.attention_tangent import attention_tangent

SECONDS, MOST = 470, 120
"""of the whole run, and of one check"""
STEPS = (("sdxl", "dmd2"), ("flux1-dev", "dmd2"), ("wan2.1-1.3b", "dmd2"), ("wan2.1-1.3b", "scm"))
"""(model, method) of the training steps at full size"""
VARIANTS: dict[str, dict[str, Any]] = {
    "math attention": {"attention": "math"},
    "compiled": {"compile": True},
    "nf4 base": {"quantization": "nf4"},
    "fp8 base": {"quantization": "fp8"},
    "all activations kept": {"gradient_checkpointing": False},
    "selective recomputation": {"gradient_checkpointing": "selective"},
    "offloaded base": {"offload": True},
}
"""against the plain run of the same model"""


def gpu(tiny: bool = False) -> dict:
    """Each check's figures, or why it has none."""
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    if device == "cpu" and not tiny:
        sys.exit("python -m benchmarks gpu: no CUDA device is here; --tiny runs the same calls on a CPU")
    start, found = time.perf_counter(), {}
    for name, check in checks(device, tiny).items():
        left = SECONDS - (time.perf_counter() - start)
        began = time.perf_counter()
        found[name] = check(min(MOST, int(left))) if left > 20 else {"error": "no time was left for it"}
        found[name]["took_seconds"] = round(time.perf_counter() - began, 1)
        print(f"{name:<28} {json.dumps(found[name])}", flush=True)
    place = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"checks": found, "device": place, "torch": torch.__version__, "tiny": tiny}


def checks(device: str, tiny: bool) -> dict[str, Callable[[int], dict[str, Any]]]:
    """What is run, by name, each within the seconds it is given."""
    own = {"device": device, "tiny": tiny, "full": True, "rounds": 1 if tiny else 3}
    found: dict[str, Callable[[int], dict[str, Any]]] = {"tests": lambda left: gpu_tests(left)}
    found["tangent of attention"] = lambda left: tangents(device, 256 if tiny else 4096)
    for model, method in STEPS:
        found[f"{model} {method}"] = lambda left, m=model, n=method: in_a_process(m, n, left, **own)
    for name, change in VARIANTS.items():
        if tiny and "compile" in change:  # a CPU compiles for minutes
            continue
        found[f"sdxl dmd2, {name}"] = lambda left, c=change: in_a_process("sdxl", "dmd2", left, **own, **c)
    return found


def gpu_tests(left: int) -> dict[str, Any]:
    """The tests that are marked gpu; those that find no card skip themselves."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "0", "tests/networks"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {left} s"}
    lines = done.stdout.strip().splitlines()
    return {"exit": done.returncode, "summary": lines[-1] if lines else done.stderr[-200:]}


def tangents(device: str, tokens: int, heads: int = 8, width: int = 64) -> dict[str, Any]:
    """Attention's forward-mode derivative: the fused kernel (on a CPU its PyTorch form), whole matrices,
    and a central difference of these in float64.
    """
    from fastgen.networks.triton_attention import fused_attention_tangent

    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, heads, tokens, width, generator=generator).to(device) for _ in range(6)]
    fused = fused_attention_tangent if device == "cuda" else attention_tangent
    ours = timed(lambda: fused(*given)[1], device)
    whole = timed(lambda: _whole(*given), device)
    there, along = [x.double() for x in given[:3]], [x.double() for x in given[3:]]
    step = 1e-5
    ends = [_attention(*(x + s * step * d for x, d in zip(there, along))) for s in (1, -1)]
    difference = ((ends[0] - ends[1]) / (2 * step)).float()
    largest = difference.abs().max()
    return {
        "tokens": tokens,
        "error_against_difference": float((ours["out"] - difference).abs().max() / largest),
        "error_of_whole_matrices": float((whole["out"] - difference).abs().max() / largest),
        "seconds_over_whole": round(ours["seconds"] / whole["seconds"], 3),
        "memory_over_whole": round(ours["bytes"] / whole["bytes"], 4) if whole["bytes"] else None,
    }


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def _whole(q, k, v, dq, dk, dv) -> torch.Tensor:
    """The derivative as PyTorch makes it, with S, P and their tangents in full."""
    return torch.func.jvp(_attention, (q, k, v), (dq, dk, dv))[1]


def timed(run: Callable[[], torch.Tensor], device: str) -> dict[str, Any]:
    """Output, seconds of the second call, and on a card the memory that it took beyond what was held."""
    run()
    wait(device)
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    out = run()
    wait(device)
    most = torch.cuda.max_memory_allocated() - held if device == "cuda" else 0
    return {"out": out, "seconds": time.perf_counter() - start, "bytes": most}
