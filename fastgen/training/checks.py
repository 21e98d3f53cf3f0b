"""Whether what a config asks fits the teacher it names: told before anything is built."""

from fastgen.config.run import RunConfig
from fastgen.core.errors import UserError
from fastgen.networks.teacher import Teacher
from fastgen.objectives import requirements_of
from fastgen.objectives.requirements import ImageTextSpec


def check_fits(cfg: RunConfig, teacher: Teacher) -> None:
    """Raises a UserError where guidance or label dropout lacks a null condition that the teacher knows, a
    CLIP loss its text, or an input for w a pipeline that fills it.
    """
    _check_told(cfg, teacher)
    codec = teacher.codec
    conditional, family = bool(codec.null(1)), getattr(teacher.backbone, "family", None)
    if cfg.teacher.guidance != 1 and family is not None and not family.guidable:
        told = f"found {cfg.teacher.guidance} for {family.name}, whose guidance is an input of the network"
        raise UserError("teacher.guidance", told, "use 1, and teacher.embedded_guidance")
    asked = {"teacher.guidance": cfg.teacher.guidance}
    for stage in cfg.all_stages():
        needs = requirements_of(stage.objective)
        asked |= {f"objective.{key}": w for key, w in needs.guidance_settings.items()}
        asked |= {"objective.real_guidance": stage.objective.real_guidance}
        reads_text = any(isinstance(one, ImageTextSpec) for one in needs.auxiliaries.values())
        if reads_text and not hasattr(codec, "prompts"):
            found = "the teacher has no captions to compare images with"
            raise UserError("objective.clip_weight", found, "set it to 0")
    if cfg.student.guidance_embedding:
        asked["student.guidance_embedding"] = max(cfg.student.guidance_embedding)
    what = "a teacher without a null class" if conditional else "an unconditional teacher"
    for key, w in asked.items():
        if isinstance(w, float) and w != 1 and not (conditional and codec.has_null):
            raise UserError(key, f"found {w} for {what}", "use 1, or leave it out")
    for stage in cfg.all_stages():
        for key, drop in requirements_of(stage.objective).dropout_settings.items():
            if drop and conditional and not codec.has_null:
                found = f"found {drop} for a teacher without a null class"
                raise UserError(f"objective.{key}", found, "use 0")


def _check_told(cfg: RunConfig, teacher: Teacher) -> None:
    """Whether a student that is told w has something to be told, and a pipeline that tells it."""
    if not cfg.student.guidance_embedding:
        return
    key, form = "student.guidance_embedding", getattr(teacher.backbone, "family", None)
    if form and form.guidance_form and not getattr(cfg.student, form.guidance_form):
        found = f"no pipeline tells a plain {form.net_class} its guidance scale"
        raise UserError(key, found, f"set student.{form.guidance_form} true, or leave it out")
