"""Whether what a config sets fits the teacher it names, checked before anything is built."""

from fastgen.config.run import RunConfig, StageConfig
from fastgen.core.errors import UserError
from fastgen.networks.codecs import TextCodec
from fastgen.networks.teacher import Teacher


def check_fits(cfg: RunConfig, teacher: Teacher) -> None:
    """Raises a UserError where guidance or label dropout lacks a null condition that the teacher knows, a
    CLIP loss its text, or an input for w a pipeline that fills it.
    """
    _check_guidance_input(cfg, teacher)
    codec = teacher.codec
    conditional, family = bool(codec.null(1)), teacher.backbone.family
    if cfg.teacher.guidance != 1 and family is not None and not family.supports_guidance:
        found = f"found {cfg.teacher.guidance} for {family.name}, whose guidance is an input of the network"
        raise UserError("teacher.guidance", found, "use 1, and set teacher.embedded_guidance")
    scales = {"teacher.guidance": cfg.teacher.guidance}
    for stage in cfg.all_stages():
        for key, method in (("objective", stage.objective), ("objective.host", method_of(stage))):
            scales |= {f"{key}.{n}": v for n, v in method if n.endswith("_guidance")}
        if getattr(method_of(stage), "clip_weight", 0) and not isinstance(codec, TextCodec):
            raise UserError("objective.clip_weight", "the teacher takes no text prompts", "set it to 0")
    if cfg.student.guidance_embedding:
        scales["student.guidance_embedding"] = max(cfg.student.guidance_embedding)
    what = "a teacher without a null class" if conditional else "an unconditional teacher"
    for key, w in scales.items():
        if isinstance(w, float) and w != 1 and not (conditional and codec.has_null):
            raise UserError(key, f"found {w} for {what}", "use 1, or leave it out")
    for stage in cfg.all_stages():
        drop = getattr(stage.objective, "cond_dropout", 0)
        if drop and conditional and not codec.has_null:
            found = f"found {drop} for a teacher without a null class"
            raise UserError("objective.cond_dropout", found, "use 0")


def _check_guidance_input(cfg: RunConfig, teacher: Teacher) -> None:
    """Whether a pipeline can pass the guidance scale to a student that takes it as an input."""
    if not cfg.student.guidance_embedding:
        return
    key, form = "student.guidance_embedding", teacher.backbone.family
    if form and form.guidance_option and not getattr(cfg.student, form.guidance_option):
        found = f"no pipeline passes the guidance scale to a plain {form.net_class}"
        raise UserError(key, found, f"set student.{form.guidance_option} to true, or leave the key out")


def method_of(stage: StageConfig):
    """The settings of a stage's method, or of the one it is wrapped around."""
    return getattr(stage.objective, "host", stage.objective)
