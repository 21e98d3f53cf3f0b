"""A diffusers denoiser as D(x_t, t, cond) -> x0, with feature taps, guidance and adapters.

`Family` declares what differs between denoiser classes; `Backbone` implements what is common to all.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.core.patterns import matches
from fastgen.diffusion.schedules import EDM, VP, Schedule, TrigFlow, expand
from fastgen.families.base import Family
from fastgen.families.parts import FLOW_TIMES, DiffusersModel, compute_dtype
from fastgen.networks import block_causal, tile_attention
from fastgen.networks.attention import as_now, kernel
from fastgen.networks.camera_embedding import CameraEmbedding
from fastgen.networks.camera_embedding import attach as attach_camera
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.guidance_adapters import Control, GuidanceAdapter, attach, attention_layers
from fastgen.networks.linear_attention import guard
from fastgen.networks.lora_targets import adapter_layers
from fastgen.networks.recomputing import keep_costly, same_casts

__all__ = ["Backbone", "Cond", "Family"]


class _AllTapsReached(Exception):
    """Raised by the hook of the last tap to end a forward pass whose remaining output is not needed."""


class Backbone(Denoiser):
    """A raw network as a denoiser: `backbone(x_t, t, cond)` returns D in float32.

    prediction is the network's native kind (see `schedules.KINDS`), or "edm" for the preconditioning of
    Karras et al. (arXiv 2206.00364, table 1).
    """

    family: Family
    net: DiffusersModel

    def __init__(
        self,
        net: DiffusersModel,
        family: Family,
        schedule: Schedule,
        prediction: str,
        start_noise: float = 1.0,
    ):
        """start_noise: share of noise where sampling begins, for a family that begins elsewhere."""
        super().__init__()
        self.start_noise = start_noise
        self.net, self.family, self.schedule, self.prediction = guard(net), family, schedule, prediction
        self.second_time = False
        """whether the network also takes the time at which its step ends, cond["r"] [B], as one more input
        channel
        """
        self.adapter: str | None = None
        self.guidance_control: Control | None = None
        """of guidance adapters, where some were added"""
        self.camera_embedding: CameraEmbedding | None = None
        """where the network, or an adapter of it, reads cameras"""
        self.spread = False
        """whether each process holds a part of it alone"""
        self.attention: str | None = None
        self.adapter_names: tuple[str, ...] = ()
        self.fixed: tuple[str, ...] = ()
        """name prefixes of the parameters that no role trains"""

    # -- prediction ----------------------------------------------------------------------------------------
    def net_time(self, t: Tensor) -> Tensor:
        """This network's time argument at the schedule's time t, float32 [B]."""
        t = t.double()
        if isinstance(self.schedule, EDM):
            return (self.family.edm_time * t.log()).float()
        if isinstance(self.schedule, VP):
            return t.float()
        if isinstance(self.schedule, TrigFlow):  # the flow level with the same signal-to-noise ratio
            t = t.sin() / (t.sin() + t.cos())
        return FLOW_TIMES[self.family.flow_time](t).float()

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Native prediction of the network, [B, C, ...] float32. cond["net_t"] [B], if present, replaces t as
        the time that the network gets.
        """
        dtype = compute_dtype(self.net)
        if self.guidance_control is not None and self.guidance_control.active is not None:
            self.guidance_control.guidance = cond["guidance"]
            cond = {k: v for k, v in cond.items() if k != "guidance"}  # an input of the adapters alone
        if self.camera_embedding is not None:
            self.camera_embedding.active, self.camera_embedding.c2w = self.adapter, cond.get("c2w")
        if self.prediction == "edm":
            x_t = x_t * expand(1 / (t.double() ** 2 + self.schedule.sigma_data**2).sqrt(), x_t)
        time, x = self.net_time(cond.get("net_t", t)), x_t
        if self.second_time:
            gap = expand(self.schedule.gap(t, cond.get("r", t)), x_t).expand_as(x_t[:, :1])
            x = torch.cat([x_t, gap], 1)
        with kernel(self.attention):
            out = self.family.call(self.net, x.to(dtype), time, cond)
        return (out[:, : x_t.shape[1]] if self.second_time else out).float()

    def to_x0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """D of a native prediction."""
        if self.prediction != "edm":
            return self.schedule.to_x0(self.prediction, out, x_t, t)
        var, t = self.schedule.sigma_data**2, t.double()
        gap = t - self.schedule.t_min if self.family.boundary else t
        skip, scale = var / (gap**2 + var), gap * var**0.5 / (t**2 + var).sqrt()
        return expand(skip, x_t) * x_t + expand(scale, x_t) * out

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.to_x0(self.raw(x_t, t, cond), x_t, t)

    def add_guidance(self) -> None:
        """Make the guidance scale, cond["guidance"] [B], an input of the network; call before adapters."""
        self.net = guard(self.family.add_guidance(self.net).eval())

    def add_camera(self, adapter: str | None) -> None:
        """Make the camera, cond["c2w"] [B, 16], an input of this adapter or (None) of the whole network."""
        if self.camera_embedding is None:
            self.camera_embedding = attach_camera(self.net)
        self.camera_embedding.add(adapter)

    def add_second_time(self) -> None:
        """Make the end of a step, cond["r"] [B], an input of the network; call before adapters."""
        if not self.second_time:
            self.net = guard(self.family.add_second_time(self.net).eval())
            self.second_time = True

    @contextmanager
    def causally(self, now: block_causal.Pass) -> Iterator[None]:
        with block_causal.attach(self.net).acting(now):
            yield

    def in_tiles(self, adapter: str | None) -> tile_attention.Control:
        try:
            control = tile_attention.attach(self.net)
        except ValueError:
            able = " or ".join(tile_attention.KINDS)
            found = f"found efficient_vdit for {type(self.net).__name__}, whose attention has no tiles here"
            raise UserError("objective.name", found, f"use a {able}, not of two experts") from None
        control.acting = self.adapter
        control.plan(adapter)
        return control

    def state(self) -> dict[str, Tensor]:
        control = self.net.__dict__.get(tile_attention.ATTRIBUTE)
        return {f"tiles/{name or 'own'}": plan for name, plan in control.plans.items()} if control else {}

    def fix(self, name: str) -> None:
        """Exclude a module of the network from training."""
        self.fixed += (f"net.{name}.",)
        self.net.get_submodule(name).requires_grad_(False)

    def fix_all_but(self, patterns: tuple[str, ...], key: str) -> None:
        """Exclude every parameter of the network whose name matches none of these from training."""
        weights = dict(self.net.named_parameters())
        kept = {name for name in weights if matches(name, patterns)}
        if not kept:
            found = f"none of the {len(weights):,} parameters matches {', '.join(patterns)}"
            raise UserError(key, found, f"give patterns of names such as {next(iter(weights))}")
        for name in weights.keys() - kept:
            self.fixed += (f"net.{name}",)
            weights[name].requires_grad_(False)

    def source(self, noise: Tensor, cond: Cond) -> Tensor:
        return self.family.source(noise, cond, self.start_noise)

    def guide(self, D: Tensor, D_uncond: Tensor, w: float | Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """D_uncond + w (D - D_uncond) (Ho & Salimans 2022, arXiv 2207.12598).

        With `Family.guidance_keeps_norm`, and where w > 1, the implied flow prediction is then rescaled to
        the norm of the conditional one, as in the family's pipeline.
        """
        guided = D_uncond + w * (D - D_uncond)
        if not self.family.guidance_keeps_norm:
            return guided
        flow, conditional = (self.schedule.from_x0("flow", d, x_t, t) for d in (guided, D))
        ratio = self.family.guidance_norm(conditional) / self.family.guidance_norm(flow)
        rescaled = self.schedule.to_x0("flow", flow * ratio, x_t, t)
        return torch.where(torch.as_tensor(w, device=D.device) > 1, rescaled, guided)

    # -- features ------------------------------------------------------------------------------------------
    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, taps: tuple[int, ...] = (-1,), score: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """(feature maps [B, C, h, w] at the taps, D) from one pass of the network.

        Without score=True D is None, and the pass ends at the last tap, unless the network is spread over
        processes: what was gathered for it is let go of at its end.
        """
        modules = self.family.taps(self.net)
        chosen = [modules[i] for i in taps]
        found: dict[int, Tensor] = {}

        def hook(index: int):
            def keep(_module, _args, out):
                found[index] = out[self.family.tap_output] if isinstance(out, tuple) else out
                if not score and len(found) == len(chosen) and not self.spread:
                    raise _AllTapsReached

            return keep

        handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(chosen)]
        D = None
        try:
            D = self(x_t, t, cond)
        except _AllTapsReached:
            assert not score
        finally:
            for handle in handles:
                handle.remove()
        tokens = [self.family.image_tokens(self.net, found[i], x_t, cond) for i in range(len(chosen))]
        return [self.family.feature_map(self.net, out, x_t).float() for out in tokens], D

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Its parameters by name; of a network that is spread over processes the parts, also where its last
        pass left some gathered.
        """
        for part in self.family.parts(self.net).values():
            if hasattr(part, "reshard"):
                part.reshard()
        return super().named_weights()

    # -- adapters ------------------------------------------------------------------------------------------
    def repeated_blocks(self, net: nn.Module) -> list[nn.Module]:
        """Those of one of its networks that diffusers names, else those whose outputs can be features."""
        names = getattr(net, "_repeated_blocks", None) or ()
        inside = list(net.modules())
        named = [m for m in inside if type(m).__name__ in names]
        return named or [m for m in self.family.taps(self.net) if any(m is one for one in inside)]

    def compile_blocks(self) -> None:
        """Compile every repeated block in place, which PyTorch does once for each kind."""
        for part in self.family.parts(self.net).values():
            for block in self.repeated_blocks(part):
                block.compile()

    def channels_last(self) -> None:
        """Put the weights of convolutions over images in channels-last order, without new parameters."""
        for parameter in self.net.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def add_adapter(
        self, name: str, rank: int, alpha: float, targets: tuple[str, ...], rs: bool = False
    ) -> None:
        """Add a LoRA adapter, which `using(name)` activates. It is scaled by alpha / rank, or with rs by
        alpha / sqrt(rank); targets are endings of layer names.
        """
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=rank,
            lora_alpha=cast(int, alpha),  # peft takes any number
            init_lora_weights="gaussian",
            target_modules=adapter_layers(self.family, self.net, tuple(targets)),
            lora_dropout=0.0,
            use_rslora=rs,
        )
        inject_adapter_in_model(config, self.net, adapter_name=name)
        for key, parameter in self.net.named_parameters():
            if "lora_" in key and f".{name}." in key:  # trained in float32, also on half-precision weights
                parameter.data = parameter.data.float()
        self.adapter_names += (name,)
        self.set_adapter(None)

    def add_guidance_adapter(
        self, name: str, settings: dict[str, Any], condition: Cond, classes: int, span: tuple[float, float]
    ) -> None:
        """Add adapters by which cond["guidance"] [B] becomes an input (AGD), which `using(name)` activates.
        `settings` are form, width, heads and multiplier; `condition` is one row, or labels below `classes`;
        `span` the scales that are trained.
        """
        key, parts = "student.kind", self.family.adapted(self.net)
        if len(parts) > 1 or not condition:
            found = f"guidance_adapter for {self.family.name}" + " without conditions" * (not condition)
            raise UserError(key, found, "use full or lora")
        net = next(iter(parts.values()))
        paths = attention_layers(net)
        if not paths:
            found = f"guidance_adapter for {type(net).__name__}, which has no attention"
            raise UserError(key, found, "use full or lora")
        states = 0 if classes else condition["encoder_hidden_states"].shape[-1]
        modules = dict(net.named_modules())
        form, width, heads = settings["form"], settings["width"], settings["heads"]
        adapters = {
            p: GuidanceAdapter(form, width, modules[p].to_q.in_features, states, classes, heads)
            for p in paths
        }
        ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64, device="cpu")
        low, high = span
        settings = {**settings, "low": low, "high": high}
        settings["time_scale"] = 1 / float(self.net_time(ends.clamp(min=1e-6)).abs().max())
        self.guidance_control = attach(net, name, adapters, settings)
        self.adapter_names += (name,)
        self.set_adapter(None)

    def set_adapter(self, name: str | None) -> None:
        """Activate one adapter (or none) from now on. Unlike peft's own function it does not change
        requires_grad.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.adapter = name
        if self.guidance_control is not None:
            self.guidance_control.active = name if name in self.guidance_control.names else None
        if tiles := self.net.__dict__.get(tile_attention.ATTRIBUTE):
            tiles.acting = name
        for module in self.net.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = name is None
                if name is not None:
                    module._active_adapter = [name]

    @contextmanager
    def using(self, name: str | None, share: float = 1.0) -> Iterator[None]:
        """Use this adapter (None: none), or a share of its weights, inside the block."""
        before = self.adapter
        if before != name:
            self.set_adapter(name)
        try:
            with nullcontext() if share == 1 else self._weakened(name, share):
                yield
        finally:
            if before != name:
                self.set_adapter(before)

    @contextmanager
    def _weakened(self, name: str | None, share: float) -> Iterator[None]:
        """Count the LoRA layers of this adapter by a share inside the block."""
        from peft.tuners.lora import LoraLayer

        layers = [m for m in self.net.modules() if isinstance(m, LoraLayer) and name in m.scaling]
        own = [layer.scaling[name] for layer in layers]
        try:
            for layer, scale in zip(layers, own):
                layer.scaling[name] = share * scale
            yield
        finally:
            for layer, scale in zip(layers, own):
                layer.scaling[name] = scale

    def enable_gradient_checkpointing(self, selective: bool = False) -> None:
        """Recompute activations in the backward pass, with the adapter that the forward pass used; selective
        keeps those of costly operations.
        """
        for part in self.family.parts(self.net).values():
            if not part._supports_gradient_checkpointing:
                found = f"found it on, which diffusers' {type(part).__name__} does not support"
                raise UserError("train.gradient_checkpointing", found, "set it to false")

        def recompute(function, *args):
            adapter, control = self.adapter, self.guidance_control
            reading = control.readings[-1] if control else None
            causal = self.net.__dict__.get(block_causal.ATTRIBUTE)
            now = causal.now if causal else None
            exact = as_now()

            def run(*inputs):
                again = control.reading(reading) if control else nullcontext()
                over = causal.acting(now) if causal else nullcontext()
                casts = same_casts() if selective else nullcontext()
                with self.using(adapter), again, over, casts, exact(), kernel(self.attention):
                    return function(*inputs)

            contexts: dict[str, Any] = {"context_fn": keep_costly} if selective else {}
            return checkpoint(run, *args, use_reentrant=False, **contexts)

        self.net.enable_gradient_checkpointing(recompute)
