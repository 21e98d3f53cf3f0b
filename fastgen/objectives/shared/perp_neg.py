"""Perp-neg: guidance towards the prompt of a view, and away from those of the views beside it as far as these
are perpendicular to it, against one object with many faces.

Paper: Armandpour et al. 2023, arXiv 2304.04968; the weights over the azimuth are threestudio's.

  d_i = e(x_t, prompt i) - e(x_t, null)
  e = e_null + w [ d_pos + sum_i a_i (d_i - d_pos <d_i, d_pos> / |d_pos|^2) ],   a_i <= 0
  |az| < 90:  r = 1 - |az| / 90,  pos = r front + (1 - r) side;  against front F(4, .5, -2.426; r), side
              F(4, .5, -2.426; 1 - r),  F(A, B, C; r) = A exp(-B r) + C
  else:       r = 2 - |az| / 90,  pos = r side + (1 - r) back;  against side F(1, .5, -.606; r), front
              F(1, .5, .967; r);  from overhead plain guidance

Prompts are mixed as their embeddings. In D it is the same formula: at one x_t, e is linear in D.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.core.batch import Batch, Cond, stack
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import expand
from fastgen.roles.roles import Role
from fastgen.threed.cameras import OVERHEAD, VIEWS, Cameras, wrapped

FRONT, SIDE, BACK, ABOVE = range(len(VIEWS))


class Against(NamedTuple):
    """What rows [B] are guided by: the mixture of two views that is sought, and two to keep away from."""

    pair: Tensor
    """[B, 2], places in `VIEWS`"""
    share: Tensor
    """[B] of the first of the pair"""
    negative: Tensor
    """[B, 2], places in `VIEWS`"""
    weight: Tensor
    """[B, 2] of the negatives, 0 or below"""


def decay(a: float, b: float, c: float, r: Tensor) -> Tensor:
    """F(a, b, c; r)."""
    return a * (-b * r).exp() + c


def against(cameras: Cameras) -> Against:
    """By azimuth and elevation."""
    far = wrapped(cameras.azimuth).abs()
    ahead, above = far < 90, cameras.elevation > OVERHEAD
    r = torch.where(ahead, 1 - far / 90, 2 - far / 90)
    front = torch.stack([decay(4, 0.5, -2.426, r), decay(4, 0.5, -2.426, 1 - r)], 1)
    behind = torch.stack([decay(1, 0.5, -0.606, r), decay(1, 0.5, 0.967, r)], 1)
    weight = -torch.where(ahead[:, None], front, behind).clamp(min=0)
    rows = lambda one, other: torch.where(  # noqa: E731
        ahead[:, None], torch.tensor(one, device=far.device), torch.tensor(other, device=far.device)
    )
    pair, negative = rows([FRONT, SIDE], [SIDE, BACK]), rows([FRONT, SIDE], [SIDE, FRONT])
    pair = torch.where(above[:, None], torch.tensor(ABOVE, device=far.device), pair)
    return Against(pair, r, negative, torch.where(above[:, None], torch.zeros_like(weight), weight))


def perpendicular(null: Tensor, positive: Tensor, others: list[Tensor], weight: Tensor, w: float) -> Tensor:
    """The guided estimate of D under the null condition, the one sought and those to keep away from, each
    [B, ...], with weights [B, number of others].
    """
    sought = positive - null
    length = sought.flatten(1).square().sum(1).clamp(min=1e-6)
    total = sought
    for i, other in enumerate(others):
        way = other - null
        along = (way * sought).flatten(1).sum(1) / length
        total = total + expand(weight[:, i].to(way), way) * (way - expand(along, way) * sought)
    return null + w * total


def perp_neg(role: Role, x_t: Tensor, t: Tensor, batch: Batch, w: float) -> Tensor:
    """D of a teacher guided so at x_t [B, ...], for a batch of views; four conditions in one pass."""
    if batch.views is None:
        raise UserError("objective.asset.perp_neg", "found for data without views", "leave it out")
    plan, table = against(Cameras.of(batch.cond["camera"])), batch.views
    rest = {k: v for k, v in batch.cond.items() if k not in table}
    first = first_rows(table, len(x_t)).to(plan.pair.device)
    pos = mixed(table, plan.pair + first, plan.share) | rest
    beside = [{k: v[(plan.negative + first)[:, i]] for k, v in table.items()} | rest for i in (0, 1)]
    conds = [batch.uncond, pos, *beside]
    null, positive, *others = role(torch.cat([x_t] * 4), t.repeat(4), stack(conds)).chunk(4)
    return perpendicular(null, positive, others, plan.weight, w)


def first_rows(table: Cond, num: int) -> Tensor:
    """Where the words of the prompt of each row begin in a table, [num, 1]: it has all words once, or once
    for every row.
    """
    shared = len(next(iter(table.values()))) == len(VIEWS)
    return torch.arange(num)[:, None] * (0 if shared else len(VIEWS))


def mixed(table: Cond, pair: Tensor, share: Tensor) -> Cond:
    """share of the first of each pair and the rest of the second, of embeddings; of what is no number with a
    fraction (masks), the first.
    """

    def mix(rows: Tensor) -> Tensor:
        first, second = rows[pair[:, 0]], rows[pair[:, 1]]
        if not rows.is_floating_point():
            return first
        part = share.to(rows).reshape(-1, *[1] * (rows.ndim - 1))
        return part * first + (1 - part) * second

    return {k: mix(v) for k, v in table.items()}
