"""Parts of a run that are no denoiser of it, each made when a stage first needs it, from the declaration of
its method (`fastgen/objectives/requirements.py`).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fastgen.core.errors import UserError
from fastgen.core.paths import asset
from fastgen.networks.backbone import Backbone
from fastgen.networks.clip_net import measuring_net
from fastgen.networks.feature_net import Images, Perceptual
from fastgen.networks.load import load_teacher
from fastgen.networks.motion import MotionHead
from fastgen.networks.rewards import Reward, Rewards
from fastgen.networks.teacher import Teacher
from fastgen.networks.vision import open_vision
from fastgen.objectives.requirements import (
    Auxiliary,
    ConceptSpec,
    DiscriminatorSpec,
    FramesSpec,
    ImagesSpec,
    ImageTextSpec,
    LevelHeadsSpec,
    LogVarianceSpec,
    MotionSpec,
    PerceptualSpec,
    RewardsSpec,
    WeakTeacherSpec,
)
from fastgen.roles.concepts import Concepts
from fastgen.roles.frames import FrameJudge, picture_channels
from fastgen.roles.heads import Discriminator, LevelHeads, LogVariance
from fastgen.roles.roles import Members, Role, Students

JUDGED_BY = {"digits": "digits", "tinted": "tinted", "moving": "tinted"}
"""the bundled network by which a mini set's pictures are judged; never the one that measures them"""


def make_auxiliary(spec: Auxiliary, cast):
    """The part of a declaration for a cast whose networks are made."""
    match spec:
        case LogVarianceSpec():
            return LogVariance().to(cast.device)
        case WeakTeacherSpec(path):
            return _weak(cast, path)
        case ImageTextSpec(path):
            return _clip(cast, path)
        case ImagesSpec():
            return Images(cast.teacher.codec)
        case RewardsSpec():
            return Rewards(open_rewards(spec, cast.teacher, cast.device), cast.teacher.codec)
        case PerceptualSpec():
            return _perceptual(cast).to(cast.device)
        case ConceptSpec(forget, override):
            return Concepts(cast.teacher.codec, forget, override)
        case MotionSpec(width):
            return _seeded(cast, lambda: MotionHead(cast.teacher.codec.shape[0], width))
        case FramesSpec(features):
            return _judge(cast, features)
        case LevelHeadsSpec():
            return _level_heads(cast, spec)
        case DiscriminatorSpec() if cast.num_students:
            return Members([_disc(cast, spec, j) for j in range(cast.num_students)])
        case DiscriminatorSpec():
            return _disc(cast, spec)


def _clip(cast, path: str):
    from fastgen.networks.clip import Alignment, image_text

    return Alignment(image_text(path, str(cast.device)), cast.teacher.codec)


def open_rewards(spec: RewardsSpec, teacher: Teacher, device) -> list[Reward]:
    """The rewards that a method is tuned by; they are the same objects wherever a run asks for them."""
    from fastgen.evaluation.rewards import open_reward

    place = "cpu" if str(device) == "meta" else str(device)
    mini_set = str((teacher.info or {}).get("measure") or "")
    return [open_reward(name, weights, mini_set, place) for name, weights in spec.models]


def _weak(cast, path: str) -> Role:
    if not path:
        found = "not given, and objective.autoguidance leads away from a weaker model"
        raise UserError("objective.weak", found, "name the folder of a smaller or less trained model")
    weak, teacher = load_teacher(path, weights=str(cast.device) != "meta").to(cast.device), cast.teacher
    same = type(weak.schedule) is type(teacher.schedule)
    if weak.codec.shape != teacher.codec.shape or not same:
        found = f"{path} makes {weak.codec.shape} on a {type(weak.schedule).__name__} schedule"
        wanted = f"{teacher.codec.shape} on a {type(teacher.schedule).__name__} schedule"
        raise UserError("objective.weak", found, f"name a model that makes {wanted}, as the teacher")
    weak.backbone.requires_grad_(False).eval()
    return Role(weak.backbone)


def _perceptual(cast) -> Perceptual:
    measured = (cast.teacher.info or {}).get("measure")
    if not measured:
        found = f"perceptual for {cast.teacher_cfg.path}, whose images no bundled net knows"
        raise UserError("objective.metric", found, "use l2, l1 or huber")
    return Perceptual(cast.teacher.codec, measuring_net(asset(f"measure/{measured}")))


def _level_heads(cast, spec: LevelHeadsSpec) -> LevelHeads:
    """One set of heads for each time at which a step of the student ends, the clean one last."""
    role = cast.parts["teacher"]
    depths = [spec.depth] * len(cast.student.times)
    depths = depths[:1] if spec.shared else [*depths[:-1], spec.clean_depth]
    base, taps = role.backbone, [(-1,)] * len(depths)
    if isinstance(base, Backbone):
        num = len(base.family.taps(base.net))
        taps = [(max(0, round(depth * num) - 1),) for depth in depths]
    return LevelHeads(_heads(cast, role, one, spec.head) for one in taps)


def _disc(cast, spec: DiscriminatorSpec, member: int = 0) -> Discriminator:
    """Heads on the features of critic or teacher, of student `member` where there are several."""
    role: Any = cast.parts[spec.features]
    role = role.members[member] if isinstance(role, (Members, Students)) else role
    taps = spec.taps or (-1,)
    if not spec.taps and isinstance(role.backbone, Backbone):
        family, net = role.backbone.family, role.backbone.net
        taps = family.spread_taps(net, spec.depths) if spec.depths else family.default_taps(net)
    return _heads(cast, role, taps, spec.head)


def _heads(cast, role: Role, taps: tuple[int, ...], head: str) -> Discriminator:
    """Heads of one kind on these taps of a role, the same at every call."""
    codec, schedule = cast.teacher.codec, cast.teacher.schedule
    t = torch.full((2,), schedule.steps(1)[0], dtype=torch.float64, device=cast.device)
    cond = {k: v.to(cast.device) for k, v in codec.null(2).items()}
    example = (torch.zeros(2, *codec.shape, device=cast.device), t, cond)
    return _seeded(cast, lambda: Discriminator(role, taps, example, head))


Made = TypeVar("Made", bound=nn.Module)


def _seeded(cast, make: Callable[[], Made]) -> Made:
    """An untrained part whose weights the run's seed alone draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cast.train_cfg.seed)
        return make().to(cast.device)


def _judge(cast, features: str) -> FrameJudge:
    """Heads on an image network for pictures of the size that the teacher makes."""
    codec, key = cast.teacher.codec, "objective.features"
    if len(codec.shape) < 3 or cast.teacher.is_analytic:
        found = "a GAN on pictures for a teacher that makes none"
        raise UserError("objective.gan_weight", found, "set it to 0")
    if not features:
        bundled = JUDGED_BY.get((cast.teacher.info or {}).get("measure") or "")
        if bundled is None:
            found = f"not given for {cast.teacher_cfg.path}, whose pictures no bundled net knows"
            raise UserError(key, found, "name the folder of a DINO or DINOv2")
        features = f"assets:rewards/{bundled}"
    vision = open_vision(features, picture_channels(codec)).to(cast.device)
    size = getattr(codec, "pixels", None) or (codec.shape[-2] * codec.patch, codec.shape[-1] * codec.patch)
    return _seeded(cast, lambda: FrameJudge(vision, codec, size))
