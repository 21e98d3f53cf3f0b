"""Whether what a config sets fits the teacher it names, checked before anything is built."""

from collections.abc import Mapping, Sequence

from fastgen.config.run import StageConfig
from fastgen.config.sections import StudentConfig, TeacherConfig
from fastgen.core.errors import UserError
from fastgen.networks.codecs import TextCodec
from fastgen.networks.quantization import check_library
from fastgen.networks.teacher import Teacher
from fastgen.objectives import REGISTRY, requirements_of
from fastgen.objectives.requirements import ImageTextSpec


def check_fits(
    teacher: Teacher, settings: TeacherConfig, student: StudentConfig, stages: Sequence[StageConfig]
) -> None:
    """Raises a UserError where guidance or label dropout lacks a null condition that the teacher knows, a
    CLIP loss its text, or an input for w a pipeline that fills it.
    """
    _check_guidance_input(student, teacher)
    _check_causal(student, teacher, stages)
    _check_source(teacher, stages)
    codec = teacher.codec
    conditional, family = bool(codec.null(1)), teacher.backbone.family
    if settings.guidance != 1 and family is not None and not family.supports_guidance:
        found = f"found {settings.guidance} for {family.name}, whose guidance is an input of the network"
        raise UserError("teacher.guidance", found, "use 1, and set teacher.embedded_guidance")
    scales: dict[str, float | None] = {"teacher.guidance": settings.guidance}
    for stage in stages:
        needs = requirements_of(stage.objective)
        scales |= {f"objective.{key}": w for key, w in needs.guidance_settings.items()}
        scales |= {"objective.real_guidance": stage.objective.real_guidance}
        reads_text = any(isinstance(one, ImageTextSpec) for one in needs.auxiliaries.values())
        if reads_text and not isinstance(codec, TextCodec):
            found = "the teacher has no captions to compare images with"
            raise UserError("objective.clip_weight", found, "set it to 0")
    if student.guidance_embedding:
        scales["student.guidance_embedding"] = max(student.guidance_embedding)
    what = "a teacher without a null class" if conditional else "an unconditional teacher"
    for key, w in scales.items():
        if isinstance(w, float) and w != 1 and not (conditional and codec.has_null):
            raise UserError(key, f"found {w} for {what}", "use 1, or leave it out")
    for stage in stages:
        for key, drop in requirements_of(stage.objective).dropout_settings.items():
            if drop and conditional and not codec.has_null:
                found = f"found {drop} for a teacher without a null class"
                raise UserError(f"objective.{key}", found, "use 0")


def _check_source(teacher: Teacher, stages: Sequence[StageConfig]) -> None:
    """Whether every method knows where the paths of this teacher begin."""
    family = teacher.backbone.family
    if family is None or family.begins_at_noise:
        return
    for name in (s.objective.name for s in stages if not requirements_of(s.objective).any_source):
        every = ((n, cls.config.model_validate({})) for n, cls in REGISTRY.items())
        able = [n for n, cfg in every if requirements_of(cfg).any_source]
        found = f"{name} begins at noise, {family.name} at a picture with noise added"
        raise UserError("objective.name", found, f"use {' or '.join(sorted(able))}")


def check_quantized(
    teacher: Teacher, kind: str, roles: Mapping[str, str], own_input: bool, stages: Sequence[StageConfig]
) -> None:
    """Raises a UserError where a quantised base cannot serve: rounded weights take no gradient, adapters that
    no loader reads are merged into full weights, and 4-bit layers have no forward-mode derivative.

    roles: full or lora, by the name of a part; own_input: whether the student has an input that its teacher
    has not.
    """
    key = "teacher.quantization"
    if teacher.is_analytic:
        raise UserError(key, f"found {kind!r} for an exact teacher", "set it to null")
    check_library(kind)
    whole = next((name for name, how in roles.items() if how == "full"), None)
    if whole:
        found = f"found {kind!r} with a full {whole}, whose weights are trained"
        raise UserError(key, found, "set student.kind and critic.kind to lora, or this to null")
    if own_input or not teacher.family.lora_loader:
        what = (
            "a student with a further input" if own_input else f"{teacher.family.name}, which loads no LoRA"
        )
        found = f"found {kind!r} with {what}: its adapter is exported merged into the full weights"
        raise UserError(key, found, "set it to null")
    for stage in stages:
        calls = requirements_of(stage.objective).network_calls(1.0, 1)
        if kind == "nf4" and any(name.endswith(" tangent") for name in calls):
            found = f"found 'nf4' with {stage.objective.name}, which differentiates the network forwards"
            raise UserError(key, found, "use int8, or objective.tangent.method difference")


def _check_guidance_input(student: StudentConfig, teacher: Teacher) -> None:
    """Whether a pipeline can pass the guidance scale to a student that takes it as an input."""
    if not student.guidance_embedding or student.kind == "guidance_adapter":
        return
    key, form = "student.guidance_embedding", teacher.backbone.family
    if form and form.guidance_option and not getattr(student, form.guidance_option):
        found = f"no pipeline passes the guidance scale to a plain {form.net_class}"
        raise UserError(key, found, f"set student.{form.guidance_option} to true, or leave the key out")


def _check_causal(student: StudentConfig, teacher: Teacher, stages: Sequence[StageConfig]) -> None:
    """Whether the teacher's network can go block by block, where it is asked to or a method needs it."""
    family, key = teacher.backbone.family, "student.causal"
    able = family is not None and family.frame_times and len(family.parts(teacher.network.net)) == 1
    name, use = "an exact teacher" if family is None else family.name, "a text-to-video Wan of one network"
    if student.causal is not None and not able:
        found = f"found for {name}, whose network takes no time of every frame"
        raise UserError(key, found, f"leave it out, or use {use}")
    if family is None or not family.temporal or student.causal is not None:
        return
    for method in (s.objective.name for s in stages if requirements_of(s.objective).blocks):
        if able:
            found = f"found null for {method} on a teacher of clips"
            raise UserError(key, found, "set student.causal.block, the latent frames of a block")
        found = f"found {method} for {name}, whose network takes no time of every frame"
        raise UserError("objective.name", found, f"use dmd2, or {use}")
