"""Rewards as methods use them: which ones, what they are asked about, and a scale that they share."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.core.paths import expand
from fastgen.networks.rewards import KEY, Rewards
from fastgen.objectives.base import Objective, ObjectiveConfig
from fastgen.objectives.requirements import Requirements, RewardsSpec
from fastgen.roles.roles import Role


class RewardConfig(BaseModel):
    """One reward."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """attributes, motion, look or tinted-clip (bundled); clip, hps, pickscore, image_reward or aesthetic (by
    local weights); contrast or jpeg; or a name of your own, whose weights are package.module:function
    """
    weights: dict[str, Annotated[str, AfterValidator(expand)]] = Field(default_factory=dict)
    """local files or folders by name, as eval.weights has them"""
    weight: float = Field(1.0, gt=0)
    """its share where several rewards are added up"""
    margin: float = 1.0
    """standard deviations above the mean at the start of the stage beyond which it pulls no more"""


class RewardedConfig(ObjectiveConfig):
    """Settings of methods that raise rewards."""

    rewards: tuple[RewardConfig, ...] = ()
    """what is raised; needed"""


def spec_of(rewards: tuple[RewardConfig, ...]) -> RewardsSpec:
    """The part that these settings describe."""
    return RewardsSpec(tuple((one.name, tuple(sorted(one.weights.items()))) for one in rewards))


def prompts_of(batch: Batch) -> list[str]:
    """What each row asks for: its text, the number of its class, or nothing."""
    if batch.texts is not None:
        return batch.texts
    labels = batch.cond.get("class_labels")
    return [""] * len(batch.noise) if labels is None else [str(int(k)) for k in labels]


def judged(rewards: Rewards, x0: Tensor, batch: Batch) -> Tensor:
    """Rewards [num, B] of samples x0, without gradient."""
    with torch.no_grad():
        return rewards(rewards.images(x0), prompts_of(batch))


def pareto(better: Tensor) -> Tensor:
    """+1 [B] where the first of two samples is worse in no reward, -1 where the second is, 0 where neither or
    both are; better [num, B] is the first's rewards minus the second's.
    """
    return (better >= 0).all(0).float() - (better <= 0).all(0).float()


class Rewarded(Objective):
    """A method that starts from a few-step student and raises its rewards; `previous` is that student, frozen
    as the stage found it.
    """

    rewards: Rewards

    @classmethod
    def requirements(cls, cfg) -> Requirements:
        """The parts; subclasses add the calls."""
        return Requirements(
            lambda guidance, num_steps: {},
            untrained=("previous",),
            auxiliaries={"rewards": spec_of(cfg.rewards)},
            real_data=False,
            one_guidance=False,
        )

    def check(self) -> None:
        if not self.cfg.rewards:
            raise UserError(KEY, "none given", "name one or more, as in objective.rewards: [{name: clip}]")

    def prepare(self) -> None:
        num, device = len(self.cfg.rewards), self.rng.device
        self.mean, self.std = torch.zeros(num, device=device), torch.ones(num, device=device)
        self.weight = torch.tensor([one.weight for one in self.cfg.rewards], device=device)

    def state(self) -> dict[str, Tensor]:
        return {"reward_mean": self.mean, "reward_std": self.std}

    @torch.no_grad()
    def calibrate(self, batch: Batch, rounds: int = 4) -> None:
        """Mean and standard deviation of each reward over samples of the student as it is, from the batch's
        conditions on every process.
        """
        noises = [batch.noise, *(self.rng.randn_like(batch.noise) for _ in range(rounds - 1))]
        found = [judged(self.rewards, self.generate(replace(batch, noise=noise)), batch) for noise in noises]
        values = torch.cat(found, 1).double()
        sums = torch.stack([torch.ones_like(values), values, values**2]).sum(-1)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        mean, square = sums[1] / sums[0], sums[2] / sums[0]
        self.mean.copy_(mean)
        self.std.copy_((square - mean**2).clamp(min=0).sqrt().clamp(min=1e-6))

    def standardised(self, values: Tensor) -> Tensor:
        """Rewards [num, B] in standard deviations above the mean at the start."""
        return (values - self.mean[:, None]) / self.std[:, None]

    def reward_logs(self, values: Tensor) -> dict[str, Tensor]:
        """Mean of each reward as it is."""
        return {f"reward_{one.name}": v.detach().mean() for one, v in zip(self.cfg.rewards, values)}

    def reference(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """D of the student as the stage found it, without gradient."""
        previous: Role = self.previous
        with torch.no_grad():
            return previous(x_t, t, cond)
