"""A diffusers denoiser seen as D(x_t, t, cond) -> x0, with feature taps, tangents and adapters in one place.

`Family` declares what differs between denoiser classes; `Backbone` does what is the same for all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import EDM, VP, Schedule, TrigFlow, expand
from fastgen.families.base import Family
from fastgen.families.parts import FLOW_TIMES
from fastgen.networks.attention import kernel
from fastgen.networks.denoiser import Denoiser
from fastgen.networks.lora_targets import adapter_layers

__all__ = ["Backbone", "Cond", "Family"]


class _Reached(Exception):
    """Raised by the deepest feature hook to skip the rest of a forward pass nobody needs."""


class Backbone(Denoiser):
    """A raw network as a denoiser: `backbone(x_t, t, cond)` returns D in float32.

    prediction is the network's native kind (see `schedules.KINDS`), or "edm" for the preconditioning of
    Karras et al. (arXiv 2206.00364, table 1).
    """

    family: Family
    net: Any
    """a network of diffusers"""

    def __init__(self, net: nn.Module, family: Family, schedule: Schedule, prediction: str):
        super().__init__()
        self.net, self.family, self.schedule, self.prediction = net, family, schedule, prediction
        self.second_time = False
        """whether the network also reads where its step ends, cond["r"] [B], as one more input channel"""
        self.adapter: str | None = None
        self.attention: str | None = None
        self.adapter_names: tuple[str, ...] = ()
        self.fixed: tuple[str, ...] = ()
        """beginnings of the names of parameters that no role trains"""

    # -- prediction ----------------------------------------------------------------------------------------
    def net_time(self, t: Tensor) -> Tensor:
        """The schedule's t as this network's time argument, float32 [B]."""
        t = t.double()
        if isinstance(self.schedule, EDM):
            return (self.family.edm_time * t.log()).float()
        if isinstance(self.schedule, VP):
            return t.float()
        if isinstance(self.schedule, TrigFlow):  # the flow level with the same signal-to-noise ratio
            t = t.sin() / (t.sin() + t.cos())
        return FLOW_TIMES[self.family.flow_time](t).float()

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Native prediction of the network, [B, C, ...] float32; it is told cond["net_t"] where that is
        given.
        """
        dtype = next(self.net.parameters()).dtype
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
        """D from the native prediction."""
        if self.prediction != "edm":
            return self.schedule.to_x0(self.prediction, out, x_t, t)
        var, t = self.schedule.sigma_data**2, t.double()
        gap = t - self.schedule.t_min if self.family.boundary else t
        skip, scale = var / (gap**2 + var), gap * var**0.5 / (t**2 + var).sqrt()
        return expand(skip, x_t) * x_t + expand(scale, x_t) * out

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.to_x0(self.raw(x_t, t, cond), x_t, t)

    def add_guidance(self) -> None:
        """Make the guidance scale an input of the network; call it before adapters are added."""
        self.net = self.family.add_guidance(self.net).eval()

    def add_second_time(self) -> None:
        """Make the end of a step an input of the network; call it before adapters are added."""
        if not self.second_time:
            self.net = self.family.add_second_time(self.net).eval()
            self.second_time = True

    def fix(self, name: str) -> None:
        """Leave a module of the network out of what its roles train."""
        self.fixed += (f"net.{name}.",)
        self.net.get_submodule(name).requires_grad_(False)

    def guide(self, D: Tensor, D_uncond: Tensor, w: float | Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """D_uncond + w (D - D_uncond) (Ho & Salimans 2022, arXiv 2207.12598); for families whose pipeline
        guides so, the flow it stands for is rescaled to the conditional one's size where w > 1.
        """
        guided = D_uncond + w * (D - D_uncond)
        if not self.family.guidance_keeps_norm:
            return guided
        flow, wanted = (self.schedule.from_x0("flow", d, x_t, t) for d in (guided, D))
        ratio = self.family.guidance_norm(wanted) / self.family.guidance_norm(flow)
        rescaled = self.schedule.to_x0("flow", flow * ratio, x_t, t)
        return torch.where(torch.as_tensor(w, device=D.device) > 1, rescaled, guided)

    # -- features ------------------------------------------------------------------------------------------
    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, taps: tuple[int, ...] = (-1,), score: bool = False
    ):
        """Feature maps [B, C, h, w] at the chosen taps; with score=True also D, else the pass stops at the
        last tap.

        Returns (features, D or None); one network pass serves both.
        """
        modules = self.family.taps(self.net)
        chosen = [modules[i] for i in taps]
        found: dict[int, Tensor] = {}

        def hook(index: int):
            def keep(_module, _args, out):
                found[index] = out[self.family.tap_output] if isinstance(out, tuple) else out
                if not score and len(found) == len(chosen):
                    raise _Reached

            return keep

        handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(chosen)]
        D = None
        try:
            D = self(x_t, t, cond)
        except _Reached:
            assert not score
        finally:
            for handle in handles:
                handle.remove()
        tokens = [self.family.image_tokens(self.net, found[i], x_t, cond) for i in range(len(chosen))]
        return [self.family.feature_map(self.net, out, x_t).float() for out in tokens], D

    # -- adapters ------------------------------------------------------------------------------------------
    def add_adapter(
        self, name: str, rank: int, alpha: float, targets: tuple[str, ...], rs: bool = False
    ) -> None:
        """Inject a LoRA named `name`; `using(name)` switches it on. rs scales by alpha / sqrt(rank)."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=adapter_layers(self.family, self.net, tuple(targets)),
            lora_dropout=0.0,
            use_rslora=rs,
        )
        inject_adapter_in_model(config, self.net, adapter_name=name)
        for key, parameter in self.net.named_parameters():
            if "lora_" in key and f".{name}." in key:  # adapters learn in float32 over a half-precision base
                parameter.data = parameter.data.float()
        self.adapter_names += (name,)
        self.set_adapter(None)

    def set_adapter(self, name: str | None) -> None:
        """Make one adapter (or none) act from now on; leaves requires_grad alone, unlike peft's own
        switch.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.adapter = name
        for module in self.net.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = name is None
                if name is not None:
                    module._active_adapter = [name]

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Act with this adapter inside the block."""
        before = self.adapter
        if before != name:
            self.set_adapter(name)
        try:
            yield
        finally:
            if before != name:
                self.set_adapter(before)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations at backward, each under the adapter its forward pass ran with."""
        for part in self.family.parts(self.net).values():
            if not part._supports_gradient_checkpointing:
                found = f"true, and diffusers' {type(part).__name__} has none"
                raise UserError("train.gradient_checkpointing", found, "set it false")

        def recompute(function, *args):
            adapter = self.adapter

            def run(*inputs):
                with self.using(adapter), kernel(self.attention):
                    return function(*inputs)

            return checkpoint(run, *args, use_reentrant=False)

        self.net.enable_gradient_checkpointing(recompute)
