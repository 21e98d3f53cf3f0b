"""A diffusers denoiser seen as D(x_t, t, cond) -> x0, with guidance, feature taps and adapters in one place.

`Family` declares what differs between denoiser classes; `Backbone` does what is the same for all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgen.errors import UserError
from fastgen.schedules import EDM, VP, Schedule, expand

Cond = dict[str, Tensor]


class Family:
    """What one diffusers class does differently. Subclasses set the attributes and, where needed, the
    methods.
    """

    name: str
    net_class: str
    component = "unet"
    pipeline: str
    """folder name of the network inside a pipeline, and the pipeline class that samples it"""
    lora_targets: tuple[str, ...] = ()
    """module-name suffixes that a LoRA student adapts by default"""
    kohya_prefix: str | None = None
    flow_time_scale = 1000.0
    """what the network's time argument is at t = 1 of a flow schedule"""
    guidance_layers: tuple[str, ...] = ()
    """layers that `add_guidance` makes; a LoRA student adapts them too"""

    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The network's native output for x [B, C, ...] at its own time argument [B]."""
        raise NotImplementedError

    def add_guidance(self, net: nn.Module) -> nn.Module:
        """The same function by a network that also takes cond["guidance"] [B]; new layers end in zeros."""
        raise UserError(
            "student.guidance_embedding",
            f"{self.net_class} has no input for the guidance scale",
            "leave it out: the student learns teacher.guidance alone",
        )

    def taps(self, net: nn.Module) -> list[nn.Module]:
        """Modules whose outputs serve as features, shallow to deep."""
        raise NotImplementedError

    def default_taps(self, net: nn.Module) -> tuple[int, ...]:
        """Taps a discriminator reads unless told otherwise."""
        raise NotImplementedError

    def spread_taps(self, net: nn.Module, num: int) -> tuple[int, ...]:
        """Up to `num` taps, evenly from a first fraction of the depth to the last (LADD)."""
        total = len(self.taps(net))
        return tuple(sorted({round((i + 1) * total / num) - 1 for i in range(num)} - {-1}))

    def feature_map(self, net: nn.Module, out: Tensor, x: Tensor) -> Tensor:
        """A tapped output as [B, C, h, w]."""
        return out

    def feature_channels(self, net: nn.Module) -> list[int]:
        """Channels of each tap."""
        raise NotImplementedError


def rebuilt(net: nn.Module, rename: tuple[str, str] = ("", ""), **changes) -> nn.Module:
    """The network of a changed config with the same weights, `rename`d; new layers keep their fresh ones."""
    with torch.device(next(net.parameters()).device), torch.random.fork_rng(devices=[]):
        fresh = type(net).from_config({**net.config, **changes})
    fresh.load_state_dict({k.replace(*rename): v for k, v in net.state_dict().items()}, strict=False)
    return fresh


class _Reached(Exception):
    """Raised by the deepest feature hook to skip the rest of a forward pass nobody needs."""


class Backbone(nn.Module):
    """A raw network as a denoiser: `backbone(x_t, t, cond)` returns D in float32.

    prediction is the network's native kind (see `schedules.KINDS`), or "edm" for the preconditioning of
    Karras et al. (arXiv 2206.00364, table 1).
    """

    def __init__(self, net: nn.Module, family: Family, schedule: Schedule, prediction: str):
        super().__init__()
        self.net, self.family, self.schedule, self.prediction = net, family, schedule, prediction
        self.adapter: str | None = None
        self.adapter_names: tuple[str, ...] = ()

    # -- prediction ----------------------------------------------------------------------------------------
    def net_time(self, t: Tensor) -> Tensor:
        """The schedule's t as this network's time argument, float32 [B]."""
        if isinstance(self.schedule, EDM):
            return (0.25 * t.double().log()).float()
        if isinstance(self.schedule, VP):
            return t.float()
        return (t.double() * self.family.flow_time_scale).float()

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Native prediction of the network, [B, C, ...] float32."""
        dtype = next(self.net.parameters()).dtype
        if self.prediction == "edm":
            x_t = x_t * expand(1 / (t.double() ** 2 + self.schedule.sigma_data**2).sqrt(), x_t)
        return self.family.call(self.net, x_t.to(dtype), self.net_time(t), cond).float()

    def to_x0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """D from the native prediction."""
        if self.prediction != "edm":
            return self.schedule.to_x0(self.prediction, out, x_t, t)
        var, t = self.schedule.sigma_data**2, t.double()
        skip, scale = var / (t**2 + var), t * var**0.5 / (t**2 + var).sqrt()
        return expand(skip, x_t) * x_t + expand(scale, x_t) * out

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.to_x0(self.raw(x_t, t, cond), x_t, t)

    def add_guidance(self) -> None:
        """Make the guidance scale an input of the network; call it before adapters are added."""
        self.net = self.family.add_guidance(self.net).eval()

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
                found[index] = out[0] if isinstance(out, tuple) else out
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
        return [self.family.feature_map(self.net, found[i], x_t).float() for i in range(len(chosen))], D

    # -- adapters ------------------------------------------------------------------------------------------
    def add_adapter(self, name: str, rank: int, alpha: float, targets: tuple[str, ...]) -> None:
        """Inject a LoRA named `name`; `using(name)` switches it on."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=list(targets),
            lora_dropout=0.0,
        )
        try:
            inject_adapter_in_model(config, self.net, adapter_name=name)
        except ValueError as error:
            leaves = sorted(
                {n.rsplit(".", 1)[-1] for n, m in self.net.named_modules() if isinstance(m, nn.Linear)}
            )
            raise UserError(
                "target_modules",
                f"no module of {type(self.net).__name__} matches {list(targets)}",
                f"linear layers here end in {leaves}",
            ) from error
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

        def recompute(function, *args):
            adapter = self.adapter

            def run(*inputs):
                with self.using(adapter):
                    return function(*inputs)

            return checkpoint(run, *args, use_reentrant=False)

        self.net.enable_gradient_checkpointing(recompute)
