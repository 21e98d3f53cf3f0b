"""Students that make a clip block after block, over a cache of the blocks before (CausVid, Self-Forcing).

A call is one pass over a whole clip whose blocks attend to those before them alone; each frame may have a
time of its own. `generate` is the rollout: a block walks the student's times, is shown to the network once
more without noise, and stays in the cache as what the next blocks attend to.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.networks.block_causal import Layers, Pass
from fastgen.networks.denoiser import Denoiser
from fastgen.roles.roles import Student, StudentSpec


class CausalStudent(Student):
    """A student whose spec has blocks. x is a clip [B, C, F, ...] of whole blocks, of any number."""

    def num_blocks(self, x: Tensor) -> int:
        return x.shape[2] // self.spec.block

    def of_blocks(self, times: Tensor, x: Tensor) -> Tensor:
        """Times of blocks [B, N] as those of frames, [B, F]."""
        return times.repeat_interleave(self.spec.block, 1)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.over((), x_t, t, cond)

    def over(self, past: Layers, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D of blocks x_t [B, C, f, ...] at t [B] or [B, f], which come after those in the cache."""
        with self.backbone.causally(Pass(self.spec.block, self.spec.window, past)):
            return super().__call__(x_t, t, cond)

    @torch.no_grad()
    def remembered(self, past: Layers, x: Tensor, cond: Cond) -> Layers:
        """The cache with a finished block x too; no gradient leads back through it."""
        now = Pass(self.spec.block, self.spec.window, past, write=True)
        t = torch.full((len(x),), self.schedule.t_min, dtype=torch.float64, device=x.device)
        with self.backbone.causally(now):
            super().__call__(x.detach(), t, cond)
        return now.memory()

    def generate(
        self,
        noise: Tensor,
        cond: Cond,
        randn_like: Callable[[Tensor], Tensor],
        last: int | Sequence[int] | None = None,
    ) -> Tensor:
        """The rollout from unit noise [B, C, F, ...]; each block carries gradient through its last call only.

        With `last` < len(times) - 1 every block stops after that step, or each after one of its own; what it
        estimates there is its sample.
        """
        past: Layers = ()
        blocks, made = noise.split(self.spec.block, 2), []
        final = len(self.times) - 1 if last is None else last
        ends = [final] * len(blocks) if isinstance(final, int) else final
        for n, (end, own) in enumerate(zip(ends, blocks)):
            made.append(self.block(past, own, cond, randn_like, end))
            if n + 1 < len(blocks):
                past = self.remembered(past, made[-1], cond)
        return torch.cat(made, 2)

    def block(
        self, past: Layers, noise: Tensor, cond: Cond, randn_like: Callable[[Tensor], Tensor], last: int
    ) -> Tensor:
        """One block from its noise, over the blocks in the cache."""
        x_t = noise * self.schedule.prior_std(self.times[0])
        with torch.no_grad():
            for i in range(last):
                t, u = self.time(i, x_t), self.time(i + 1, x_t)
                x_t = self.between(self.over(past, x_t, t, cond), x_t, t, u, randn_like)
        x = self.over(past, x_t, self.time(last, x_t), cond)
        return self.sample_at(x, x_t, last)


def make_student(backbone: Denoiser, adapter: str | None, spec: StudentSpec) -> Student:
    """The student of a spec: block by block where it has blocks."""
    return (CausalStudent if spec.block else Student)(backbone, adapter, spec)


def check_frames(block: int, frames: int, key: str, per: int = 1) -> None:
    """Refuse a clip of so many latent frames, `per` frames each, that is no whole blocks."""
    if block and frames % block:
        below = max(block, frames // block * block)
        fits = [(n - 1) * per + 1 for n in (below, below + block)]
        found = f"{frames} latent frames are no whole blocks of {block}"
        raise UserError(key, found, f"give {fits[0]} or {fits[1]} frames")


def check_window(window: int, blocks: int, key: str) -> None:
    """Refuse a cache that holds more blocks than the student was trained with."""
    if window > blocks:
        found = f"found {window} blocks, and clips of training have {blocks}"
        raise UserError(key, found, f"give {blocks} or fewer: attention never saw more")
