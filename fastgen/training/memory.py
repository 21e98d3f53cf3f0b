"""What a run needs in memory, computed from configs with every network on the meta device.

python -m fastgen.training.memory            table of the models in configs/teachers, by role mode and card
python -m fastgen.training.memory --write    into docs/memory.md (a test holds it to what this prints)
"""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.config.parse import merge, read_files
from fastgen.config.run import StageConfig, validate
from fastgen.config.sections import TrainConfig
from fastgen.core.paths import config
from fastgen.families.parts import compute_dtype
from fastgen.networks.backbone import Backbone
from fastgen.networks.codecs import TextCodec
from fastgen.networks.offload import layers_to_offload
from fastgen.networks.quantization import layers_to_quantize, quantized_bytes, stored_tensors
from fastgen.networks.recomputing import is_costly
from fastgen.objectives import requirements_of
from fastgen.roles.roles import Role, learned
from fastgen.threed.generators import TEXT, GeneratedAssets
from fastgen.training.assembly import make_cast
from fastgen.training.cast import Cast
from fastgen.training.optimizers import state_bytes
from fastgen.training.preparing import trained

BYTES = 4  # gradients, optimizer states and averages are float32
GIB = 2**30
CARDS, USABLE = (24, 40, 80), 0.92  # GiB, and the part of them that CUDA and fragments leave
HEAD = """# Memory by model, role mode and card

`python -m fastgen.training.memory --write` computes this page from `configs/teachers/*.yaml` with every
network on the meta device; nothing in it is typed. The run it describes: DMD2 without GAN (teacher,
student, critic), batch 1, frozen weights in half precision, what is trained in float32 with AdamW and
one average, gradient checkpointing, fused attention, the adapter ranks of the config. *Shared LoRA*
keeps one frozen base under all three roles, *full copies* a frozen teacher, a student and a critic.
Weights, gradients, optimizer states and averages are exact, activations (the second addend) an
estimate. *Over an nf4 base* is shared LoRA with `teacher.quantization nf4`; int8 and fp8 lie halfway
between. *Offloaded* is shared LoRA with `teacher.offload true`: the frozen base waits in the machine's
memory and costs time, one layer of it at a time is on the card. A card counts as enough at {usable:.0%}
of its size. Encoders are needed until prompts are cached, before anything is trained. What fits no card
needs sharding.

| model | parameters | x0 | guidance | {num}-step times | encoders \
| shared LoRA | fits | over an nf4 base | fits | offloaded | fits | full copies | fits |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass
class Memory:
    """Bytes by purpose while training, and of encoders that are gone by then."""

    rows: dict[str, float]
    encoders: float

    @property
    def total(self) -> float:
        return sum(self.rows.values())


def estimate(cast: Cast, train: TrainConfig) -> Memory:
    """Weights, gradients, Adam's two states and averages exactly; activations as autograd keeps them."""
    codec = cast.teacher.codec
    vae, whole = _bytes(codec.vae), _bytes(codec)
    counts = _learned(cast)
    heads = sum(p.numel() for m in cast.parts.values() if isinstance(m, nn.Module) for p in m.parameters())
    size, passes = _activations(cast, train.gradient_checkpointing)
    batch, student = train.train_batch_size, cast.student
    half = 0.5 if train.mixed_precision != "no" and _dtype(student) == torch.float32 else 1.0
    averaged = sum(p.numel() for p in student.trainable().values())
    rows = {
        "weights (all roles, shared ones once)": sum(_bytes(b) for b in cast.backbones())
        - saved_by(cast, cast.teacher_cfg.quantization)
        - (saved_by_offload(cast) if cast.teacher_cfg.offload else 0.0)
        + vae
        + heads * BYTES,
        "gradients": sum(counts.values()) * BYTES,
        "Adam states": 2 * sum(num * _state_bytes(cast, name) for name, num in counts.items()),
        "EMA": len(train.ema_decay) * averaged * BYTES,
        f"activations (estimate: one pass x {passes} x batch {batch})": size * passes * batch * half,
    }
    return Memory(rows, whole - vae)


def _learned(cast: Cast) -> dict[str, int]:
    """Numbers of trained weights by part: roles, and modules that are no denoiser, such as heads."""
    parts = {n: p for n, p in cast.parts.items() if n != "teacher" and isinstance(p, Role | nn.Module)}
    return {n: sum(p.numel() for p in learned(part).values()) for n, part in parts.items()}


def _state_bytes(cast: Cast, part: str) -> float:
    """Bytes of one of Adam's states of a weight of this part, which the last stage's optimizer moves."""
    optim = cast.stages[-1].optim
    player = part.rstrip("0123456789")
    return state_bytes(getattr(optim, player if player in type(optim).model_fields else "critic"))


def _bytes(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(t.numel() * t.element_size() for p in module.parameters() for t in stored_tensors(p.data))


def saved_by(cast: Cast, kind: str | None) -> float:
    """What a base that is still to be quantised will take less."""
    if kind is None or str(cast.device) != "meta":
        return 0.0
    base = cast.teacher.network
    layers = layers_to_quantize(base.family, base.net).values()
    return sum(v.weight.numel() * v.weight.element_size() - quantized_bytes(v, kind) for v in layers)


def saved_by_offload(cast: Cast) -> float:
    """What frozen weights take less where one layer of them is on the card at a time."""
    kept = trained(cast.parts)
    nets = [(b, kept) for b in cast.backbones()] + [(vae, set()) for vae in [cast.teacher.codec.vae] if vae]
    sizes = [
        sum(p.numel() * p.element_size() for p in weights)
        for net, own in nets
        for _, weights in layers_to_offload(net, own)
    ]
    return float(sum(sizes) - max(sizes, default=0))


def _dtype(role: Role):
    """Precision a role's network computes in."""
    return compute_dtype(getattr(role.backbone, "net", role.backbone))


class _Fused(torch.autograd.Function):
    """Attention that keeps its inputs and its output, as every fused kernel does."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out


class _FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch would choose the kernel that keeps every attention weight. `seen` is given
    the results.
    """

    def __init__(self, seen: Callable[[Tensor], Any] = lambda out: None):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
            if given["query"].is_meta:
                out = _Fused.apply(given["query"], given["key"], given["value"])
                self.seen(out)
                return out
        return func(*args, **(kwargs or {}))


class _CostlyResults(TorchDispatchMode):
    """Gives `seen` what selective checkpointing keeps."""

    def __init__(self, seen: Callable[[Tensor], Any]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if is_costly(func, args):
            self.seen(out[0] if isinstance(out, tuple) else out)
        return out


class _Kept:
    """Distinct storages that autograd holds, those of parameters left out."""

    def __init__(self, own: set[int]):
        self.own = own
        self.tensors: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        self.tensors[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def size(self) -> int:
        return sum(v.untyped_storage().nbytes() for k, v in self.tensors.items() if k not in self.own)


def _activations(cast: Cast, checkpointing: bool | str) -> tuple[int, int]:
    """(bytes autograd keeps for one sample's pass through the student, passes with a graph in one turn).

    With gradient checkpointing: what enters each block, of selective one also what is costly to compute, and
    the inside of the largest block, alive while it is recomputed.
    """
    codec, device = cast.teacher.codec, cast.device
    student: Role = cast.student
    if cast.student_cfg.asset is not None:  # what a render keeps depends on what is seen; a critic is larger
        critic = cast.parts.get("critic")
        if not isinstance(critic, Role):
            return _of_generator(cast), 1
        student = critic
    for p in student.trainable().values():
        p.requires_grad_(True)
    own = {p.untyped_storage()._cdata for b in cast.backbones() for p in b.parameters()}
    kept, inside = _Kept(own), [0]

    def block(function, *args):
        for arg in args:
            if isinstance(arg, Tensor):
                kept(arg)
        inner = _Kept(own | set(kept.tensors))
        selective = checkpointing == "selective"
        fused, others = (_FusedAttention(kept), _CostlyResults(kept)) if selective else (nullcontext(),) * 2
        with torch.autograd.graph.saved_tensors_hooks(inner, lambda x: x), fused, others:
            out = function(*args)
        inside[0] = max(inside[0], inner.size)
        return out

    if checkpointing and isinstance(student.backbone, Backbone):
        student.backbone.net.enable_gradient_checkpointing(block)
    t = torch.full((1,), cast.student.times[0], dtype=torch.float64, device=device)
    cond = {k: v.to(device) for k, v in codec.null(1).items()}
    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
        out = student.raw(torch.zeros(1, *codec.shape, device=device), t, cond)
    del out
    return kept.size + inside[0], max(_passes(cast, s) for s in cast.stages)


def _of_generator(cast: Cast) -> int:
    """Bytes that autograd keeps of a network that makes an asset, its render apart; none of other assets."""
    net, codec = cast.student.backbone, cast.teacher.codec
    if not isinstance(net, GeneratedAssets) or not isinstance(codec, TextCodec):
        return 0
    kept = _Kept({p.untyped_storage()._cdata for p in net.parameters()})
    text = torch.zeros(1, *codec.cond_shapes[TEXT], device=cast.device)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
        out = net.generator(text)
    del out
    return kept.size


def _passes(cast: Cast, stage: StageConfig) -> int:
    """Network passes whose graphs live together, on average over turns and rounded up."""
    with_grad = sum(
        v for n, v in network_calls(cast, stage, len(cast.student.times)).items() if n.endswith("+grad")
    )
    return max(1, math.ceil(with_grad / len(requirements_of(stage.objective).players)))


def network_calls(cast: Cast, stage: StageConfig, num_steps: int) -> dict[str, float]:
    """Network calls of a stage's step by role; a drawn guidance always takes both of the teacher's passes."""
    needs, drawn = requirements_of(stage.objective), cast.student_cfg.guidance_embedding
    w = drawn[1] if drawn else needs.learned_guidance(cast.teacher_cfg.guidance)
    return needs.network_calls(w, num_steps)


def models() -> list[str]:
    """Configs of released models: those with a published layout."""
    names = sorted(p.stem for p in config("teachers").glob("*.yaml"))
    return [n for n in names if "layout:" in config(f"teachers/{n}.yaml").read_text()]


def row(name: str) -> str:
    """One line of the table, in GiB."""
    found = {}
    for kind in ("lora", "full"):
        ours = {"objective": {"name": "dmd2", "gan_weight": 0.0}, "data": {"prompts": "any"}}
        values = merge(
            read_files([str(config(f"teachers/{name}.yaml"))]), {**ours, "student": {"kind": kind}}
        )
        cfg = validate(values)
        cast = make_cast(cfg, "meta")
        found[kind] = estimate(cast, cfg.train)
        if kind == "lora":
            whole = found[kind].rows
            first = next(iter(whole))
            for less, saved in (("nf4", saved_by(cast, "nf4")), ("offload", saved_by_offload(cast))):
                found[less] = Memory(whole | {first: whole[first] - saved}, found[kind].encoders)
    codec, times = cast.teacher.codec, cast.student.times
    guidance = f"{cfg.teacher.guidance:g}" if codec.guidance is None else f"{codec.guidance:g} as an input"
    num = sum(p.numel() for p in cast.teacher.backbone.parameters())
    text = (
        f"| [{name}](../configs/teachers/{name}.yaml) | {num / 1e9:.2f}B | {'x'.join(map(str, codec.shape))} "
    )
    text += f"| {guidance} | {', '.join(f'{t:.4g}' for t in times)} | {found['lora'].encoders / GIB:.1f} "
    return text + "".join(_cells(found[kind]) for kind in ("lora", "nf4", "offload", "full")) + "|"


def _cells(memory: Memory) -> str:
    """What is fixed and what moves, in GiB, and the cards that it fits."""
    *fixed, moving = memory.rows.values()
    cards = [str(c) for c in CARDS if memory.total <= USABLE * c * GIB]
    return f"| {sum(fixed) / GIB:.1f} + {moving / GIB:.1f} | {', '.join(cards) or 'none'} "


def main(argv: list[str]) -> None:
    """Print the page, or write it."""
    from fastgen.core.console import quiet

    quiet()
    text = HEAD.format(usable=USABLE, num=4) + "\n".join(row(n) for n in models()) + "\n"
    if "--write" in argv:
        (config("teachers").parents[1] / "docs" / "memory.md").write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
