"""How many different things a set of samples shows: Inception score, Vendi score, distances within a request.

Inception score:  exp(mean KL(p(y|x) || p(y)))                      (Salimans 2016, arXiv 1606.03498)
Vendi score:      exp(entropy of the eigenvalues of K / n), K the cosines of features: 1 for samples that are
                  all the same, n for orthogonal ones               (Friedman & Dieng 2022, arXiv 2210.02410)
Diversity:        mean distance between two samples of one request
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.evaluation.metrics.estimate import Estimate, around, mean_of


def inception_score(logits: Tensor) -> Estimate:
    """Of class logits [N, K], all at once."""
    logs = logits.double().log_softmax(1)
    p = logs.exp()
    mean = p.mean(0)
    gain = (p * (logs - mean.clamp(min=1e-300).log())).sum(1)
    value = float(gain.mean().exp())
    return around(value, lambda: value * gain)


def inception_score_splits(logits: Tensor, num_splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """(mean, standard deviation) over shuffled equal parts, as papers quote it: a part of n / 10 samples
    scores lower than all of them.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    parts = [
        inception_score(part).value for part in logits[order].tensor_split(min(num_splits, len(logits) // 2))
    ]
    found = torch.tensor(parts, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def vendi_score(features: Tensor) -> Estimate:
    """Of features [N, d] of any length; the smaller of the n x n and the d x d matrix is taken apart."""
    x = normalize(features.double(), dim=1)
    n, d = x.shape
    matrix = x.T @ x / n if n > d else x @ x.T / n
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    value = math.exp(float(-torch.special.xlogy(values, values).sum()))
    logs = torch.where(values > 1e-12, values.clamp(min=1e-300).log(), 0)

    def influence() -> Tensor:
        """-x' log(C) x of each sample, C = X' X / n: the entropy's change with its weight."""
        if n > d:
            return -value * ((x @ vectors).square() * logs).sum(1)
        return -value * n * (vectors.square() * values * logs).sum(1)

    return around(value, influence)


def within_groups(x: Tensor, group_size: int, distance: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
    """Mean of distance(a, b) [P] over all pairs of each group of `group_size` rows that follow each other."""
    num = len(x) // group_size
    assert num and group_size > 1, (len(x), group_size)
    first, second = torch.triu_indices(group_size, group_size, 1)
    found = []
    for group in x[: num * group_size].unflatten(0, (num, group_size)):
        found.append(distance(group[first], group[second]).double().mean())
    return mean_of(torch.stack(found), "groups")
