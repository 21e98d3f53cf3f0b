"""What distillations of point clouds compare: clouds [B, N, 3] as sets, of which no point has a place."""

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.networks.codecs import repeated


def is_clouds(x: Tensor) -> bool:
    """Whether x0 are clouds [B, N, 3]."""
    return x.ndim == 3 and x.shape[2] == 3


def placed(x: Tensor, cond: Cond) -> Tensor:
    """Where the points of x0 [B, N, 3] are: beside where they start, cond["start"] [B, M, 3], each of whose
    points several of x0 come from; x itself without such a condition.
    """
    start = cond.get("start")
    return x if start is None else x + repeated(start, x.shape[1])


def check_clouds(shape: tuple[int, ...], keys: dict[str, float]) -> None:
    """Refuse settings by key, those above 0, of a teacher that makes no clouds."""
    for key, value in keys.items():
        if value and (len(shape) != 2 or shape[1] != 3):
            found = f"found {value:g} for a teacher whose x0 has the shape {tuple(shape)}"
            raise UserError(f"objective.{key}", found, "set it to 0: it compares point clouds")


@torch.no_grad()
def nearest_of(a: Tensor, b: Tensor) -> Tensor:
    """Number [B, N] of the point of b [B, M, 3] that is nearest to each of a [B, N, 3]."""
    return torch.stack([torch.cdist(p, q).argmin(1) for p, q in zip(a.detach(), b.detach())])


def points_at(x: Tensor, index: Tensor) -> Tensor:
    """Points [B, K, 3] of x [B, N, 3] by their numbers [B, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def ways(a: Tensor, b: Tensor) -> Tensor:
    """From each point of a [B, N, 3] to the nearest of b; gradient flows through both."""
    return points_at(b, nearest_of(a, b)) - a


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Mean distance to the nearest point of the other cloud, both ways, halved, [B]; not squared."""
    return 0.5 * (ways(a, b).norm(dim=-1).mean(1) + ways(b, a).norm(dim=-1).mean(1))


def squared_chamfer(a: Tensor, b: Tensor) -> Tensor:
    """The same of squared distances by coordinate, [B]: smooth where points meet."""
    return 0.5 * (ways(a, b).square().mean((1, 2)) + ways(b, a).square().mean((1, 2)))


@torch.no_grad()
def key_points(cloud: Tensor, chosen: Tensor, neighbours: int, share: float) -> Tensor:
    """Numbers [B, K] of the most curved of the `chosen` [B, C] points of a cloud [B, N, 3]: the smallest of
    the three eigenvalues of a point's neighbours' covariance, over their sum.
    """
    some = points_at(cloud, chosen)
    near = torch.stack(
        [torch.cdist(p, q).topk(min(neighbours, len(q)), largest=False).indices for p, q in zip(some, cloud)]
    )
    around = points_at(cloud, near.flatten(1)).unflatten(1, near.shape[1:])
    gap = around - around.mean(2, keepdim=True)
    values = torch.linalg.eigvalsh((gap.transpose(2, 3) @ gap).double())
    curvature = values[..., 0] / values.sum(-1).clamp(min=1e-12)
    best = curvature.topk(max(2, round(share * chosen.shape[1])), dim=1).indices
    return chosen.gather(1, best)


def structure(x: Tensor, truth: Tensor, keys: Tensor) -> Tensor:
    """Squared error [B] of the distances between key points [B, K] of the truth, of whom each is the nearest
    point of x in its place.
    """
    at = points_at(truth, keys)
    own = points_at(x, nearest_of(at, x))
    return (_between(own) - _between(at)).square().mean((1, 2))


def _between(points: Tensor) -> Tensor:
    """Distances [B, K, K], smooth where points meet."""
    return ((points[:, :, None] - points[:, None]).square().sum(-1) + 1e-8).sqrt()
