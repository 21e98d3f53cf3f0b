"""What the score distillations into assets share: the weight of their gradient, the annealed noise levels,
the regularisers of what was rendered, and what an asset keeps.
"""

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fastgen.core.batch import Batch
from fastgen.core.errors import UserError
from fastgen.diffusion import losses
from fastgen.diffusion.schedules import Schedule, expand
from fastgen.objectives.base import Objective, TimeConfig, guided
from fastgen.objectives.requirements import Calls, passes
from fastgen.objectives.shared.perp_neg import perp_neg
from fastgen.roles.roles import Role

Omega = Literal["sigma2", "one", "alpha_sigma2"]
"""omega(t): sigma^2, 1, or alpha sigma^2"""


class AssetTermsConfig(BaseModel):
    """Regularisers of an asset and the guidance of its views; off for students that are networks."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sparsity: float = Field(0.0, ge=0)
    """weight of the mean of sqrt(opacity^2 + 0.01)"""
    opaque: float = Field(0.0, ge=0)
    """weight of the entropy of the opacity, which takes fog away"""
    opaque_from: int = Field(0, ge=0)
    """step from which on opaque counts"""
    perp_neg: bool = False
    """guide each view away from the views beside it, against many faces (perp-neg); twice the teacher's
    passes"""

    @property
    def used(self) -> bool:
        return bool(self.sparsity or self.opaque or self.perp_neg)


class AnnealConfig(BaseModel):
    """A lower ceiling of the noise levels late in a run, by one step and not by a ramp."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    after: int = Field(0, ge=0)
    """step from which on it holds; 0 never"""
    high: float = Field(0.5, gt=0, le=1)
    """highest grid position from then on"""

    def at(self, time: TimeConfig, k: int) -> TimeConfig:
        """The noise levels of step k."""
        late = self.after and k >= self.after
        return time.model_copy(update={"high": min(time.high, self.high)}) if late else time


def omega(kind: Omega, S: Schedule, t: Tensor) -> Tensor | float:
    """The weight [B] of the difference of two noise estimates at t."""
    if kind == "one":
        return 1.0
    return S.sigma(t) ** 2 * (S.alpha(t) if kind == "alpha_sigma2" else 1)


def pulled(
    x: Tensor, real: Tensor, fake: Tensor, S: Schedule, t: Tensor, kind: Omega, h: Tensor | float = 1.0
) -> Tensor:
    """Loss whose gradient in x is omega(t) h (e_real - e_fake) / B of two estimates D at the same x_t, summed
    over a sample as the papers do: e_real - e_fake = alpha / sigma (D_fake - D_real). h: a weight [B].
    """
    weight = h * omega(kind, S, t) * S.alpha(t) / S.sigma(t)
    return losses.score_difference(x, real.nan_to_num(), fake.nan_to_num(), weight) * x[0].numel()


def along(x: Tensor, g: Tensor, weight: Tensor | float) -> Tensor:
    """Loss whose gradient in x is weight g / B, for a difference g [B, ...] of two noise estimates."""
    weight = expand(weight, x) if isinstance(weight, Tensor) else weight
    target = (x - (weight * g).nan_to_num().to(x)).detach()
    return 0.5 * (x - target).square().sum() / len(x)


def view_passes(terms: AssetTermsConfig) -> Callable[[float], int]:
    """Network passes of one guided call, which perp-neg makes four."""
    return lambda guidance: 4 if terms.perp_neg else passes(guidance)


def asset_calls(teacher: Callable[[float], int]) -> Callable[[float, int], Calls]:
    """Network calls of a step that draws one sample and asks the teacher alone, at a guidance so often."""
    return lambda guidance, num_steps: {
        "student": (num_steps - 1) / 2,
        "student+grad": 1,
        "teacher": teacher(guidance),
    }


class AssetObjective(Objective):
    """A score distillation whose student may be assets, with `asset: AssetTermsConfig` in its settings."""

    def check(self) -> None:
        """Refuse regularisers of a student that is no asset."""
        terms = self.cfg.asset
        if terms.used and not self.student.backbone.is_asset:
            found = f"found sparsity {terms.sparsity:g}, opaque {terms.opaque:g} and perp_neg "
            found += f"{str(terms.perp_neg).lower()} for a student that is a network"
            raise UserError("objective.asset", found, "leave it out, or train a 3D asset: student.asset")

    def view_guided(self, teacher: Role, x_t: Tensor, t: Tensor, batch: Batch, w: float) -> Tensor:
        """D of the guided teacher at x_t [B, ...], for views by perp-neg where that is on."""
        one = perp_neg if self.cfg.asset.perp_neg else guided
        return one(teacher, x_t, t, batch, w)

    def asset_terms(self, k: int) -> tuple[Tensor | float, dict]:
        """(regularisers of what the student drew last, what to log of it); nothing of a network."""
        net, terms = self.student.backbone, self.cfg.asset
        if not net.is_asset:
            return 0.0, {}
        opaque = terms.opaque if k >= terms.opaque_from else 0.0
        penalty = net.penalty(terms.sparsity, opaque) if terms.used else 0.0
        return penalty, {"opacity": net.opacity(), "penalty": float(penalty)}

    def settle(self, k: int) -> None:
        """Let an asset move its parts once step k is done."""
        if self.sync:
            self.student.backbone.settle(k)
