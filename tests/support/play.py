"""A step of a method on a cast of networks, played with plain SGD."""

from contextlib import nullcontext

import torch

from fastgen.core.batch import Batch
from fastgen.networks.codecs import TextCodec


def batch(cast, num=2):
    codec, generator = cast.teacher.codec, torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, num, *codec.shape, generator=generator)
    if isinstance(codec, TextCodec):
        cond = codec.prompts(["a red dress", "a bag"][:num])
    else:
        cond = codec.labels(torch.arange(num) % codec.num_classes)
    return Batch(x0, cond, codec.null(num), noise, torch.arange(num))


def play(objective, one, k, check=False, around=nullcontext):
    """One step with plain SGD, each turn's losses computed inside `around()`; the losses by player."""
    losses, turns = [], objective.step(one, k)
    while True:
        with around():
            item = next(turns, None)
        if item is None:
            break
        loss, active = item[0], objective.active
        loss.backward()
        losses.append((active, float(loss.detach())))
        for player in objective.players.values():
            for parameter in player.trainable().values():
                if check and player.name != active:
                    assert parameter.grad is None, f"{player.name} got a gradient in {active}'s turn"
                if parameter.grad is not None:
                    parameter.data -= 0.01 * parameter.grad
                    parameter.grad = None
    return losses
