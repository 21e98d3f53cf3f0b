"""What a method needs of a run, declared by `Objective.requirements(cfg)` for the settings it is given.

One declaration for all code that must know it before anything is trained: the config checks, the code that
builds the networks, the dry run, the memory estimate, the export. A method around another one (`msd`,
`disback`) takes its host's declaration and changes it with `dataclasses.replace`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Calls = dict[str, float]
"""network calls by role; "student+grad" are those that a backward pass goes through"""


# -- auxiliaries: parts that are no denoiser of the run ------------------------------------------------------
@dataclass(frozen=True)
class DiscriminatorSpec:
    """Heads on the features of another part."""

    features: Literal["teacher", "critic"] = "teacher"
    """whose features the heads read"""
    taps: tuple[int, ...] = ()
    """features by index; empty takes the family's default, or `depths` of them"""
    depths: int = 0
    """heads spread evenly over the network's depth; 0 takes the default taps"""
    head: Literal["pooled", "patch", "mean"] = "pooled"
    """one logit per feature map, one per token, or the map's channel mean without anything to learn"""


@dataclass(frozen=True)
class LevelHeadsSpec:
    """Heads on the teacher's features at the end of each of the student's steps."""

    depth: float
    """share of the teacher's depth at which they read, where a step ends in noise"""
    clean_depth: float
    """the same where it ends in clean data"""
    head: Literal["pooled", "patch"]
    shared: bool = False
    """one set of heads for all ends, at `depth`"""


@dataclass(frozen=True)
class LogVarianceSpec:
    """A learned weight of the loss at each time."""


@dataclass(frozen=True)
class ImageTextSpec:
    """A frozen image-text network (CLIP)."""

    path: str


@dataclass(frozen=True)
class WeakTeacherSpec:
    """A weaker version of the teacher, for autoguidance."""

    path: str


@dataclass(frozen=True)
class PerceptualSpec:
    """The frozen feature network of the teacher's data set, as a metric."""


@dataclass(frozen=True)
class ImagesSpec:
    """The frozen decoder: x0 as pictures, differentiable."""


@dataclass(frozen=True)
class MotionSpec:
    """A small network of latents that begins as the identity (`networks/motion.py`)."""

    width: int
    """its channels"""


@dataclass(frozen=True)
class FramesSpec:
    """Heads on a frozen image network, which judge decoded pictures one by one."""

    features: str = ""
    """folder of that network, or "pixels"; empty is the bundled one of the teacher's set"""


@dataclass(frozen=True)
class RewardsSpec:
    """Frozen scores of images and prompts, larger is better."""

    models: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """the name of each, and its (name, local path) pairs of weights"""


@dataclass(frozen=True)
class ConceptSpec:
    """The conditions of what is to be forgotten, sorted from those of the data."""

    forget: tuple[str, ...]
    override: tuple[str, ...] = ()


Auxiliary = (
    DiscriminatorSpec
    | LevelHeadsSpec
    | LogVarianceSpec
    | ImageTextSpec
    | WeakTeacherSpec
    | PerceptualSpec
    | ImagesSpec
    | MotionSpec
    | FramesSpec
    | RewardsSpec
    | ConceptSpec
)


# -- the declaration -----------------------------------------------------------------------------------------
def passes(guidance: float) -> int:
    """Network passes of one guided call: conditional and unconditional, except at scale 1."""
    return 1 if guidance == 1 else 2


def remembered_calls(teacher_steps: int) -> Callable[[float, int], Calls]:
    """Network calls of a step that learns from what the teacher made once for its rows, in so many steps."""
    return lambda guidance, num_steps: {
        "student+grad": 1,
        "teacher (first epoch)": teacher_steps * passes(guidance),
    }


def base_name(part: str) -> str:
    """The kind of a numbered part: "critic2", the critic of student 2, is a critic."""
    return part.rstrip("0123456789")


@dataclass(frozen=True)
class Requirements:
    """What a method with given settings needs, and what its students can do."""

    network_calls: Callable[[float, int], Calls]
    """(guidance of the teacher, student steps) -> expected network calls of one training step by role; a
    guided call counts two
    """
    players: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"student": ("student",)})
    """what is trained: players, each with one optimizer, and the parts that each one trains"""
    untrained: tuple[str, ...] = ("teacher",)
    """networks that no optimizer updates: teacher, and target, previous or path, copies of a trained one"""
    auxiliaries: Mapping[str, Auxiliary] = field(default_factory=dict)
    """parts that are no denoiser of the run, by name, with their settings"""
    num_students: int = 0
    """students behind a router; 0 where there is a single one without"""
    real_data: bool = True
    """whether `step` reads batch.x0"""
    dispreferred: bool = False
    """whether `step` reads batch.dispreferred, where the data has it"""
    losers: bool = False
    """whether `step` cannot do without batch.dispreferred"""
    appearance: bool = False
    """whether `step` reads batch.appearance, where the data has it"""
    any_source: bool = False
    """whether the paths from the data may begin elsewhere than at noise (`Family.source`)"""
    fidelity: tuple[float, float] | None = None
    """least and highest fidelity that the student is told when it is sampled; None: it takes none"""
    degraded: bool = False
    """whether the teacher is shown a less degraded picture than the student (data.degradation)"""
    forgets: tuple[str, ...] = ()
    """classes or words of prompts that the student is to forget, which its measurement leaves out"""

    one_guidance: bool = True
    """whether the guided teacher is followed at one scale, which `real_guidance` may set; False where the
    method draws the scale, or calls no guided teacher
    """
    guidance: float | None = None
    """the scale that ends up in the student, where the settings fix it; None is teacher.guidance"""
    guidance_embedding: bool = False
    """whether the student may take the guidance scale as an input (`student.guidance_embedding`)"""
    guidance_settings: Mapping[str, float] = field(default_factory=dict)
    """settings that are guidance scales, by key: other values than 1 need a null condition"""
    dropout_settings: Mapping[str, float] = field(default_factory=dict)
    """settings that replace conditions by the null one, by key: other values than 0 need one"""

    few_step: bool = True
    """whether the student becomes a few-step generator; if not, an ODE solver samples it, as a teacher"""
    causal: bool = False
    """whether the student may make clips block after block (student.causal)"""
    blocks: bool = False
    """whether it has to, where the teacher makes clips"""
    tiles: bool = False
    """whether attention of the student keeps some tiles of frames only"""
    step_end: bool = False
    """whether the student also reads where its step ends: u(x_t, t, r) instead of D(x_t, t)"""
    grid_steps: int = 0
    """steps of the grid that any step count may be taken from; 0 where the time list is fixed"""
    step_counts: tuple[int, ...] = ()
    """step counts trained at once, inputs of student and critic in place of the guidance; empty: one"""
    accumulates: bool = True
    """whether gradients may be accumulated over micro-batches: not where a step updates a player repeatedly
    """
    forward_mode: bool = False
    """whether a network is differentiated in forward mode (a tangent by PyTorch's JVP)"""
    negative_prompt_scale: float = 0.0
    """scale of negative prompts (NASA) that the export is sampled with"""
    why_not_sampled: Callable[[int, str], str] = lambda num_steps, sampler: ""
    """(student steps, sampler) -> why a student so trained cannot be sampled so; empty if it can"""

    @property
    def follows_guidance(self) -> bool:
        """Whether these settings learn from the teacher at one fixed guidance scale."""
        return self.one_guidance and "teacher" in self.untrained

    def learned_guidance(self, teacher_guidance: float) -> float:
        """The guidance scale that ends up in the student."""
        return teacher_guidance if self.guidance is None else self.guidance

    @property
    def trained(self) -> tuple[str, ...]:
        """Parts that are trained, the student's first."""
        return tuple(part for parts in self.players.values() for part in parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part by name, trained ones first; an auxiliary of each student goes by its numbered names."""
        numbered = {base_name(part) for part in self.trained}
        others = (name for name in self.auxiliaries if name not in numbered)
        return tuple(dict.fromkeys((*self.trained, *self.untrained, *others)))
