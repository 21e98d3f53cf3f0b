"""What every network offers that a role can stand on, whether diffusers made it or a formula."""

import copy
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.diffusion.schedules import Schedule
from fastgen.families.base import Family
from fastgen.networks.block_causal import Pass
from fastgen.networks.tile_attention import Control


class Denoiser(nn.Module):
    """D(x_t, t, cond) -> x0 [B, ...] for x_t [B, ...] and times t [B]; subclasses write `forward` and `raw`.

    The defaults are those of a network without adapters and without inputs beyond cond.
    """

    schedule: Schedule
    prediction: str
    """native kind of `raw` (see `schedules.KINDS`)"""
    family: Family | None = None
    """what a diffusers class declares; None for closed forms and for the small networks beside them"""
    second_time: bool = False
    """whether the network also reads where its step ends, cond["r"] [B]"""
    is_asset: bool = False
    """whether it renders 3D assets and is no network"""
    adapter_names: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    """beginnings of the names of parameters that no role trains"""

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's native prediction [B, ...]."""
        raise NotImplementedError

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, taps: tuple[int, ...] = (-1,), score: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """(feature maps [B, C, h, w] at the taps, D if score else None)."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def source(self, noise: Tensor, cond: Cond) -> Tensor:
        """The far end [B, ...] of the paths from the data, given unit noise; see `Family.source`."""
        return noise

    def guide(self, D: Tensor, D_uncond: Tensor, w: float | Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """D_uncond + w (D - D_uncond) (Ho & Salimans 2022, arXiv 2207.12598)."""
        return D_uncond + w * (D - D_uncond)

    def using(self, name: str | None, share: float = 1.0) -> AbstractContextManager[None]:
        """Act with the adapter of this name (None: with none), or a share of it, inside the block."""
        return nullcontext()

    def causally(self, now: Pass) -> AbstractContextManager[None]:
        """Act block by block inside the block: attend to what came before alone, the cache of `now` included.
        Times may then be those of every frame, [B, F]."""
        raise NotImplementedError(f"{type(self).__name__} cannot go block by block")

    def in_tiles(self, adapter: str | None) -> Control:
        """Make the network able to attend in tiles, under the masks of whatever adapter acts, dense at first;
        UserError of networks that cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention between frames")

    def add_guidance(self) -> None:
        """Make the guidance scale, cond["guidance"] [B], an input of the network."""
        raise NotImplementedError(f"{type(self).__name__} cannot take the guidance scale")

    def add_second_time(self) -> None:
        """Make the end of a step, cond["r"] [B], an input of the network."""
        raise NotImplementedError(f"{type(self).__name__} cannot take a second time")

    def settle(self, k: int) -> None:
        """After step k of training, on every process; nothing for a network."""

    def penalty(self, sparse: float, opaque: float) -> Tensor:
        """Regularisers of the sample that was drawn last, by weight; of a network there are none."""
        raise NotImplementedError(f"{type(self).__name__} is no 3D asset")

    def opacity(self) -> Tensor:
        """Mean opacity of the sample that was drawn last."""
        raise NotImplementedError(f"{type(self).__name__} is no 3D asset")

    def state(self) -> dict[str, Tensor]:
        """Tensors beside the parameters that a resumed run needs."""
        return {}

    def add_camera(self, adapter: str | None) -> None:
        """Make the camera, cond["c2w"] [B, 16], an input; networks that have no place for it go without."""

    def enable_gradient_checkpointing(self, selective: bool = False) -> None:
        """Recompute activations in the backward pass; networks without blocks keep them."""

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Its parameters by name, as an optimizer may keep them."""
        return dict(self.named_parameters())

    def trainable_copy(self) -> "Denoiser":
        """A network that starts as this one and can be trained, in float32."""
        return copy.deepcopy(self).float()
