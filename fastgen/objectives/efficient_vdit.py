"""Efficient-vDiT: a few-step student of clips whose attention keeps a few tiles of frames, layer by layer.

Paper: Ding et al. 2025, arXiv 2502.06155. Its first stage, multi-step consistency distillation of the dense
student, is `consistency` with segments (or `tscd`); this is what follows, in one stage of the same run.

  tiles      attention between F latent frames is F x F tiles;  mask M_m: frame i sees frame j iff i = j, or
             one of them is among m global frames, evenly spaced         F (2 m + 1) - m^2 - m of F^2 tiles
  search     once, before the first update, without training:  for every layer l, the others dense, at
             calibration_times times of noised clips
               e_l(m) = sum |Attn_full(h) - Attn_{M_m}(h)|^2 / sum |Attn_full(h)|^2
             layer l gets the fewest global frames with e_l(m) <= error, all where none has
  distil     x_t = alpha x0 + sigma eps,  t ~ U(times of the student)
             update G with  |v_sparse(x_t, t) - v_dense(x_t, t)|^2
                            + layer_weight mean_l |out_l,sparse - out_l,dense|^2
             v_dense, out_l,dense: the student as the stage before left it, frozen, without masks

A picture, or a clip of one latent frame, has one tile: it is dense, and there is nothing to distil.

Differs
- no code is public, and the paper's settings are not all printed: error, layer_weight and the choice of
  calibration inputs are ours.
- |out_l - out_l|^2 is measured behind each attention's output projection, and divided by the mean square of
  the dense one, so that no layer's scale decides.
- masks belong to the number of latent frames they were searched at; other clips are refused.
- their masks are shown with sequence parallelism; here one process computes whole clips.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.diffusion import losses
from fastgen.networks.tile_attention import Control, attend, evenly, layers_of, share_of_tiles
from fastgen.objectives.base import Objective, ObjectiveConfig, Updates, data_of, native_weighting
from fastgen.objectives.requirements import Calls, Requirements
from fastgen.roles.roles import Role


class EfficientVDiTConfig(ObjectiveConfig):
    """Search of tile masks, and distillation of the sparse student from the dense one."""

    name: Literal["efficient_vdit"] = "efficient_vdit"
    error: float = Field(0.1, ge=0)
    """largest share of an attention layer's output that its mask may change; 0 keeps all layers dense"""
    globals: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """numbers of global frames that are tried; empty is all of them, from 1"""
    calibration_times: int = Field(4, ge=1)
    """times at which masks are searched, of a batch of the data"""
    grid_steps: int = Field(0, ge=0)
    """steps of the time grid that is distilled, as of the stage before; 0: the student's own times alone"""
    layer_weight: float = Field(0.1, ge=0)
    """weight of the attention outputs beside the prediction"""


class EfficientVDiT(Objective, config=EfficientVDiTConfig):
    @classmethod
    def requirements(cls, cfg) -> Requirements:
        def network_calls(guidance: float, num_steps: int) -> Calls:
            return {"student+grad": 1, "previous": 1}

        return Requirements(
            network_calls,
            untrained=("previous",),
            one_guidance=False,
            tiles=True,
            grid_steps=cfg.grid_steps,
        )

    def check(self) -> None:
        self.searched, net, family = False, self.student.backbone, self.student.backbone.family
        self.control = net.in_tiles(self.student.adapter) if family and family.temporal else None

    def step(self, batch: Batch, k: int) -> Updates:
        cfg, S, x0 = self.cfg, self.schedule, data_of(batch)
        if k == 0 and not self.searched:
            self.follow("previous")
            self.search(batch)
        t = self.times()[self.rng.randint(len(self.times()), len(x0))].to(x0.device)
        x_t = S.noise(x0, self.rng.randn_like(x0), t)
        with torch.no_grad(), outputs(self.previous) as wanted:
            dense = self.previous(x_t, t, batch.cond)
        with self.turn("student"):
            with outputs(self.student) as found:
                sparse = self.student(x_t, t, batch.cond)
            final = losses.denoising(S, sparse, dense, t, native_weighting(self.student))
            layers = layer_distance(found, wanted)
            loss = final + cfg.layer_weight * layers
            yield loss, {"final": final, "layers": layers, "tiles": self.kept()}

    def times(self) -> Tensor:
        """The times that are distilled."""
        grid = self.schedule.training_grid(self.cfg.grid_steps)[:-1] if self.cfg.grid_steps else None
        return torch.tensor(grid or self.student.times, dtype=torch.float64)

    @torch.no_grad()
    def search(self, batch: Batch) -> None:
        """Choose the global frames of every layer by the outputs that they change, the network dense."""
        self.searched = True
        if self.control is None:
            return
        plan, x0 = self.control.plan(self.student.adapter).zero_(), data_of(batch)
        errors = OutputErrors(self.control, self.cfg.globals)
        with self.control.watching(errors):
            for time in self.schedule.steps(self.cfg.calibration_times):
                t = torch.full((len(x0),), time, dtype=torch.float64, device=x0.device)
                self.student(self.schedule.noise(x0, self.rng.randn_like(x0), t), t, batch.cond)
        frames = self.control.frames
        chosen = fewest(errors.relative(), errors.tried, frames, self.cfg.error)
        plan.copy_(torch.tensor([frames, *chosen]))
        share = share_of_tiles(frames, chosen)
        print(f"tiles: global frames of {frames} by layer {chosen}: {share:.0%} of dense attention")

    def kept(self) -> float:
        """Tiles of all layers together, as a share of dense attention's."""
        plan = [0] if self.control is None else self.control.plan(self.student.adapter).tolist()
        return share_of_tiles(plan[0], plan[1:]) if plan[0] else 1.0


# -- search --------------------------------------------------------------------------------------------------
class OutputErrors:
    """How much of every layer's attention output each number of global frames changes, over the calls that it
    is shown.
    """

    def __init__(self, control: Control, tried: Sequence[int] = ()):
        self.control, self.tried = control, tuple(tried)
        self.sums: Tensor | None = None
        """[layers, 1 + tried]: sum |full|^2, then sum |full - masked|^2 under each"""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, text: int, out: Tensor) -> None:
        frames = self.control.frames
        self.tried = self.tried or tuple(range(1, frames))
        if self.sums is None:
            self.sums = torch.zeros(len(self.control.names), 1 + len(self.tried), dtype=torch.float64)
        made = (attend(query, key, value, frames, evenly(frames, m), text) for m in self.tried)
        found = [out, *(out - one for one in made)]
        self.sums[layer] += torch.stack([one.double().square().sum() for one in found]).cpu()

    def relative(self) -> Tensor:
        """e_l(m), [layers, tried], of all processes together."""
        assert self.sums is not None, "no layer was called"
        if torch.distributed.is_initialized():
            place = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            sums = self.sums.to(place)
            torch.distributed.all_reduce(sums)
            self.sums = sums.cpu()
        return self.sums[:, 1:] / self.sums[:, :1]


def fewest(errors: Tensor, tried: Sequence[int], frames: int, error: float) -> list[int]:
    """For every layer the fewest of the global frames tried whose error [layers, tried] is no larger; all
    frames where none is.
    """
    rows = [[m for m, e in zip(tried, row) if e <= error and m < frames] for row in errors.tolist()]
    return [min(row, default=frames) for row in rows]


# -- attention outputs ---------------------------------------------------------------------------------------
@contextmanager
def outputs(role: Role) -> Iterator[list[Tensor]]:
    """What every layer of self-attention in tiles gives to the frames inside the block, in order; of other
    networks nothing.
    """
    found: list[Tensor] = []
    layers = layers_of(getattr(role.backbone, "net", None))

    def keep(_module, _args, out) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_hook(keep) for layer in layers.values()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layer_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """mean_l |out_l - wanted_l|^2 / |wanted_l|^2; 0 without layers."""
    every = [(a - b).square().mean() / b.square().mean() for a, b in zip(found, wanted)]
    return torch.stack(every).mean() if every else torch.zeros(())
