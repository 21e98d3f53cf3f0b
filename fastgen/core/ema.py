"""Exponential moving averages of a player's trainable parameters, several decays at once."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(average: Mapping[str, Tensor], current: Mapping[str, Tensor], decay: float) -> None:
    """average <- decay average + (1 - decay) current, in place; tensors are matched by their order."""
    assert len(average) == len(current)
    torch._foreach_lerp_(list(average.values()), [p.detach() for p in current.values()], 1 - decay)


class EMA:
    """One average per decay. At step k the decay is at most (1 + k) / (10 + k), so that the averages of
    short runs do not lag behind.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decays: tuple[float, ...]):
        self.decays = decays
        self.averages = {d: {n: p.detach().clone() for n, p in parameters.items()} for d in decays}

    def update(self, parameters: Mapping[str, Tensor], k: int) -> None:
        for decay, average in self.averages.items():
            ema_update(average, parameters, min(decay, (1 + k) / (10 + k)))

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{d}/{n}": p for d, average in self.averages.items() for n, p in average.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, value in self.state_dict().items():
            value.copy_(state[key])


class swapped:
    """Context manager in which parameters have their averaged values:
    `with swapped(student.trainable(), ema.averages[d]): ...`.
    """

    def __init__(self, parameters: dict[str, Tensor], average: dict[str, Tensor]):
        self.parameters, self.average = parameters, average

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            current = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(current)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_) -> None:
        self._swap()
