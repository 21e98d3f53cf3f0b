"""Parts of a run that are no players' denoisers, each made when a stage first names it.

logvar: the learned weighting of a loss; disc: heads on features; weak: the teacher's weaker version of
autoguidance; clip: an image-text net; perceptual: the measuring net as a metric.
"""

import torch

from fastgen.config.run import StageConfig
from fastgen.core.errors import UserError
from fastgen.core.paths import asset
from fastgen.networks.backbone import Backbone
from fastgen.networks.feature_net import FeatureNet, Perceptual
from fastgen.networks.load import load_teacher
from fastgen.roles.heads import Discriminator, LogVariance
from fastgen.roles.roles import Members, Role, Students
from fastgen.training.checks import method_of


def make_extra(name: str, cast, stage: StageConfig):
    """The part of this name for a cast whose players are made."""
    method, num = method_of(stage), range(cast.num_students)
    makers = {
        "logvar": lambda: LogVariance().to(cast.device),
        "weak": lambda: _weak(cast, stage.objective.weak),
        "disc": lambda: Members([_disc(cast, method, j) for j in num]) if num else _disc(cast, method),
        "clip": lambda: _clip(cast, method.clip),
        "perceptual": lambda: _perceptual(cast).to(cast.device),
    }
    return makers[name]()


def _clip(cast, path: str):
    from fastgen.networks.clip import Alignment, image_text

    return Alignment(image_text(path, str(cast.device)), cast.teacher.codec)


def _weak(cast, path: str) -> Role:
    if not path:
        found = "not given, and objective.autoguidance leads away from a weaker model"
        raise UserError("objective.weak", found, "an early checkpoint or a smaller model of the same data")
    weak, teacher = load_teacher(path, weights=str(cast.device) != "meta").to(cast.device), cast.teacher
    same = type(weak.schedule) is type(teacher.schedule)
    if weak.codec.shape != teacher.codec.shape or not same:
        found = f"{path} makes {weak.codec.shape} on a {type(weak.schedule).__name__} schedule"
        allowed = f"as the teacher: {teacher.codec.shape}, {type(teacher.schedule).__name__}"
        raise UserError("objective.weak", found, allowed)
    weak.backbone.requires_grad_(False).eval()
    return Role(weak.backbone)


def _perceptual(cast) -> Perceptual:
    measured = (cast.teacher.info or {}).get("measure")
    if not measured:
        found = f"perceptual for {cast.cfg.teacher.path}, whose images no bundled net knows"
        raise UserError("objective.metric", found, "use l2, l1 or huber")
    return Perceptual(cast.teacher.codec, FeatureNet.load(asset(f"measure/{measured}")))


def _disc(cast, objective, member: int = 0) -> Discriminator:
    """Heads on the features of critic or teacher, of student `member` where there are several."""
    objective = getattr(objective, "gan", objective)  # a section of its own where one loss of several
    features = getattr(objective, "disc_features", "teacher")
    role = cast.parts[features if features in cast.parts else "teacher"]
    role = role.members[member] if isinstance(role, (Members, Students)) else role
    codec, schedule = cast.teacher.codec, cast.teacher.schedule
    taps, head = objective.disc_taps or (-1,), getattr(objective, "disc_head", "pooled")
    if not objective.disc_taps and isinstance(role.backbone, Backbone):
        family, net = role.backbone.family, role.backbone.net
        depths = getattr(objective, "disc_depths", 0)
        taps = family.spread_taps(net, depths) if depths else family.default_taps(net)
    t = torch.full((2,), schedule.steps(1)[0], dtype=torch.float64, device=cast.device)
    cond = {k: v.to(cast.device) for k, v in codec.null(2).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cast.cfg.train.seed)
        example = (torch.zeros(2, *codec.shape, device=cast.device), t, cond)
        head = "mean" if getattr(objective, "disc_mean", False) else head
        return Discriminator(role, taps, example, head).to(cast.device)
