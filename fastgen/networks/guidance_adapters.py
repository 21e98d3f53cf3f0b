"""AGD: classifier-free guidance in one pass a step, by small adapters on the attention of a frozen network.

Paper: Perez Jensen and Sadat 2025, arXiv 2503.07274. To the output of every attention to the text (of a
network without one: of every attention) is added A(h; w, t, c), h its input, w the guidance scale:
  attention   queries of h over the tokens [w, t, c]: softmax(q k^T / sqrt d) v, then a linear layer
  offset      a small network of their sum, one vector per sample; it does not look at h
w and t enter by random Fourier features; the last layer starts at zero, so that A = 0.

    from guidance_adapter import load_guidance_adapter, remove, set_guidance
    load_guidance_adapter(pipe, "x-guidance-adapter.safetensors", guidance=3.0)
    pipe(prompt, guidance_scale=1.0)            # one pass a step, guided by 3; set_guidance(pipe, 5.0) next
    remove(pipe)

The adapters are forward hooks: no weight of the network changes, LoRAs may be loaded before or after, and
another checkpoint of the same architecture takes the same file. Negative prompts do nothing. This file needs
torch and safetensors only and is part of exports.

Differs
- the time has an encoder of its own, like w, instead of the base's time embedding: nothing of the base's
  inside is read, so that one file serves any class of network.
- w is multiplied by `multiplier`, 0.25 unless set (theirs: 1, or 1000 in the offset form): at frequencies
  N(0, 1) larger products turn neighbouring scales into unrelated features.
- several heads are possible (theirs: one); no dropout in the offset form.
"""

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADER = "guidance_adapter"
"""key of the settings in the header of a file"""
ATTRIBUTE = "guidance_adapters"
"""name under which an attention holds its adapters"""
TIME_CYCLES = 2.0
"""the largest time, in the unit of the Fourier features"""


class Reading(NamedTuple):
    """What the adapters read of one call of their network."""

    guidance: Any
    """scale w: a number, or [B]"""
    time: Any
    """the network's own time: a number, or [B]"""
    condition: Tensor
    """text states [B, L, C], or class labels [B]"""
    mask: Tensor | None
    """1 for tokens that count, [B, L]"""


class ScalarEncoder(nn.Module):
    """A number per sample [B] as [B, width]: fixed random Fourier features, then a small network."""

    frequency: Tensor
    phase: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequency", torch.randn(width))
        self.register_buffer("phase", torch.rand(width))
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.LayerNorm(width)
        )

    def forward(self, s: Tensor) -> Tensor:
        return self.layers((2 * math.pi * (s[:, None] * self.frequency + self.phase)).cos())


class GuidanceAdapter(nn.Module):
    """A(h; w, t, c) for one attention whose input h has `channels`; the condition's rows have `states`
    channels, or are class labels below `classes`.
    """

    def __init__(
        self, form: str, width: int, channels: int, states: int = 0, classes: int = 0, heads: int = 1
    ):
        super().__init__()
        self.form, self.heads = form, heads
        self.guidance, self.time = ScalarEncoder(width), ScalarEncoder(width)
        self.condition = nn.Embedding(classes, width) if classes else nn.Linear(states, width)
        if form == "attention":
            self.query = nn.Linear(channels, width, bias=False)
            self.key = nn.Linear(width, width, bias=False)
            self.value = nn.Linear(width, width, bias=False)
            for layer in (self.query, self.key, self.value):
                nn.init.xavier_uniform_(layer.weight)
        else:
            self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, h: Tensor, w: Tensor, t: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
        """A [B, N, channels] for h [B, N, channels], w [B], t [B] in units of the Fourier features."""
        c = self.condition(condition)
        c = c[:, None] if c.ndim == 2 else c
        mask = c.new_ones(c.shape[:2]) if mask is None else mask.to(c)
        scalars = torch.stack([self.guidance(w), self.time(t)], 1)
        if self.form == "offset":
            mean = (c * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            return self.output(F.silu(self.hidden(scalars.sum(1) + mean)))[:, None]
        tokens = torch.cat([scalars, c], 1)
        tokens = tokens + positions(tokens.shape[1], tokens.shape[2]).to(tokens)
        allowed = torch.cat([mask.new_ones(len(mask), 2), mask], 1)[:, None] > 0.5
        read = (self.query(h), self.key(tokens), self.value(tokens))
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in read)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        return self.output(found.transpose(1, 2).flatten(2))


def positions(length: int, width: int) -> Tensor:
    """Sinusoidal encoding [length, width], sines first."""
    frequency = torch.exp(torch.arange(width // 2) * (-math.log(1e4) / (width / 2)))
    phase = torch.arange(length)[:, None] * frequency
    return F.pad(torch.cat([phase.sin(), phase.cos()], 1), (0, width % 2))


class Control:
    """What the adapters of one network share: which of them act, the scale, and what the current call is
    given.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = dict(settings)
        self.names: tuple[str, ...] = ()
        self.active: str | None = None
        self.guidance: Any = float(settings.get("guidance", 1.0))
        self.readings: list[Reading | None] = []
        self.handles: list[Any] = []

    def read(self, arguments: Mapping[str, Any]) -> Reading | None:
        """Of a network call's arguments by name."""
        if self.active is None:
            return None
        condition = arguments.get("encoder_hidden_states")
        condition = arguments["class_labels"] if condition is None else condition
        mask = arguments.get("encoder_attention_mask")
        return Reading(self.guidance, arguments["timestep"], condition, mask)

    @contextmanager
    def reading(self, reading: Reading | None):
        """Give the adapters this reading inside the block, where layers are called by themselves."""
        self.readings.append(reading)
        try:
            yield
        finally:
            self.readings.pop()

    def added(self, adapter: GuidanceAdapter, hidden: Tensor) -> Tensor:
        """What one adapter adds to the output of its attention, whose input is [B, N, C] or [B, C, h, w]."""
        reading = self.readings[-1]
        assert reading is not None, "adapters act inside a call of their network"
        kind, device = adapter.output.weight.dtype, hidden.device
        h = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
        w, t = (
            torch.as_tensor(v, device=device).to(kind).reshape(-1).expand(len(h))
            for v in (reading.guidance, reading.time)
        )
        w, t = w * self.settings["multiplier"], t * (TIME_CYCLES * self.settings["time_scale"])
        condition = reading.condition
        condition = condition.to(kind) if condition.is_floating_point() else condition
        found = adapter(h.to(kind), w, t, condition, reading.mask)
        if hidden.ndim == 4:
            found = found.transpose(1, 2)
            found = found.unflatten(2, hidden.shape[2:]) if found.shape[2] > 1 else found[..., None]
        return found.to(hidden)


def attention_layers(net: nn.Module) -> list[str]:
    """Names of the attentions that take adapters: those to the text, joint ones, or else all."""
    found = {n: m for n, m in net.named_modules() if hasattr(m, "to_q") and hasattr(m, "to_out")}
    cross = [n for n in found if n.split(".")[-1] == "attn2"]
    joint = [n for n, m in found.items() if getattr(m, "add_k_proj", None) is not None]
    return cross or joint or list(found)


def attach(net: nn.Module, name: str, adapters: Mapping[str, GuidanceAdapter], settings: Mapping) -> Control:
    """Add one adapter to each attention named in `adapters`; inactive until the control's `active` is `name`.

    ValueError if the network lacks one of them.
    """
    control = getattr(net, "guidance_control", None)
    if control is None:
        control = Control(settings)
        _listen(net, control)
    modules = dict(net.named_modules())
    for path, adapter in adapters.items():
        if path not in modules:
            raise ValueError(
                f"{type(net).__name__} has no {path!r}: the adapter belongs to another architecture"
            )
        module = modules[path]
        if not hasattr(module, ATTRIBUTE):
            setattr(module, ATTRIBUTE, nn.ModuleDict())
            control.handles.append(module.register_forward_hook(_adding(control), with_kwargs=True))
        getattr(module, ATTRIBUTE)[name] = adapter
    control.names += (name,)
    return control


def _listen(net: nn.Module, control: Control) -> None:
    """Have every call of the network read for its adapters, and forgotten after it."""
    signature = inspect.signature(net.forward)

    def before(_net, args, kwargs):
        control.readings.append(control.read(signature.bind_partial(*args, **kwargs).arguments))

    def after(_net, _args, _out):
        control.readings.pop()

    control.handles.append(net.register_forward_pre_hook(before, with_kwargs=True))
    control.handles.append(net.register_forward_hook(after, always_call=True))
    net.__dict__["guidance_control"] = control


def _adding(control: Control):
    def hook(module, args, kwargs, output):
        adapters = getattr(module, ATTRIBUTE)
        if control.active is None or control.active not in adapters:
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        extra = control.added(adapters[control.active], hidden)
        return (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra

    return hook


# -- files ---------------------------------------------------------------------------------------------------
def load_guidance_adapter(pipe, file, guidance: float | None = None, name: str = "guidance") -> Control:
    """Put the adapters of a file onto a pipeline or network, acting at this scale (None: the file's own).

    ValueError for a file that holds none, or that belongs to another architecture.
    """
    from safetensors import safe_open

    net = _denoiser(pipe)
    with safe_open(file, "pt") as handle:
        header = (handle.metadata() or {}).get(HEADER)
        tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118
    if header is None:
        raise ValueError(f"{file} holds no guidance adapter")
    settings = json.loads(header)
    remove(net)
    form, heads = settings["form"], settings.get("heads", 1)
    adapters = {path: _restored(form, heads, state) for path, state in _by_layer(tensors).items()}
    place = next(net.parameters()).device
    control = attach(net, name, {p: a.to(place).eval() for p, a in adapters.items()}, settings)
    control.active = name
    set_guidance(net, settings["guidance"] if guidance is None else guidance)
    return control


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """State of the adapter of each attention, from keys <attention>.guidance_adapters.<name>."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        path, _, rest = key.partition(f".{ATTRIBUTE}.")
        found.setdefault(path, {})[rest] = value
    return found


def _restored(form: str, heads: int, state: Mapping[str, Tensor]) -> GuidanceAdapter:
    """The adapter of a state; its sizes are those of the tensors."""
    channels, width = state["output.weight"].shape
    rows, columns = state["condition.weight"].shape
    sizes = {"states": columns} if "condition.bias" in state else {"classes": rows}
    adapter = GuidanceAdapter(form, width, channels, **sizes, heads=heads)
    adapter.load_state_dict(dict(state))
    return adapter.requires_grad_(False)


def set_guidance(pipe, guidance: float) -> None:
    """Act at another scale; warns outside the range that the adapter was trained for."""
    control = getattr(_denoiser(pipe), "guidance_control", None)
    if control is None:
        raise ValueError("no guidance adapter is loaded")
    low, high = control.settings["low"], control.settings["high"]
    if not low <= guidance <= high:
        warnings.warn(f"guidance {guidance:g}: the adapter was trained for {low:g} to {high:g}", stacklevel=2)
    control.guidance = float(guidance)


def remove(pipe) -> None:
    """Take the adapters off a pipeline or network, which is then what it was before."""
    net = _denoiser(pipe)
    control = net.__dict__.pop("guidance_control", None)
    for handle in control.handles if control else ():
        handle.remove()
    for module in list(net.modules()):
        if hasattr(module, ATTRIBUTE):
            delattr(module, ATTRIBUTE)


def _denoiser(pipe):
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None) or pipe
