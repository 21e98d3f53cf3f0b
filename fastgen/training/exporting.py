"""A run as its export describes it: what its last stage trained, and the files of `fastgen.export`."""

import shutil
from pathlib import Path

import torch

from fastgen.core.files import write_text
from fastgen.export import write
from fastgen.export.assets import AssetInfo, card, export_assets
from fastgen.export.describe import Trained
from fastgen.export.info import read_info
from fastgen.export.model_card import SAMPLES, read_command
from fastgen.export.write import export_student
from fastgen.objectives import requirements_of
from fastgen.roles.sana_sprint import as_exported
from fastgen.threed.student import AssetStudent

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_dtype(trainer) -> torch.dtype:
    """The precision a run exports in: its own choice, else float16 for teachers and float32 for students."""
    chosen = trainer.train_cfg.export_dtype
    few_step = requirements_of(trainer.cast.stages[-1].objective).few_step
    return torch.float16 if chosen == "no" and not few_step else DTYPES[chosen]


def trained(trainer) -> Trained:
    """The student of a run as it stands, whose last stage says how it is sampled."""
    cast = trainer.cast
    needs, student = requirements_of(cast.stages[-1].objective), cast.student
    return Trained(
        teacher=cast.teacher,
        student=student,
        objective="+".join(dict.fromkeys(s.objective.name for s in cast.stages)),
        few_step=needs.few_step,
        takes=lambda num: not needs.why_not_sampled(num, student.sampler),
        guidance=needs.learned_guidance(cast.student_guidance),
        nasa_scale=needs.negative_prompt_scale,
        base=cast.teacher_cfg.path,
        teacher_steps=cast.teacher_cfg.num_steps,
        training_steps=trainer.step,
        run_name=Path(trainer.folder).name,
        command=read_command(Path(trainer.folder)),
        dtype=export_dtype(trainer),
        example=trainer.example,
        enlarges=trainer.enlarges,
    )


def export_run(trainer, folder: Path, results: dict) -> Path:
    """Write the student of a run (call inside the EMA swap); `results` go on its card."""
    student = trainer.cast.student.backbone
    if isinstance(student, AssetStudent):
        info = asset_info(trainer)
        return export_assets(student, info, folder, trainer.cast.shown_texts)
    return export_student(trained(trainer), folder, results)


def asset_info(trainer) -> AssetInfo:
    """What the export of assets says about itself."""
    cast, views, student = trainer.cast, trainer.cast.views, trainer.cast.student.backbone
    return AssetInfo(
        prompt=views.prompt,
        objective="+".join(dict.fromkeys(s.objective.name for s in cast.stages)),
        training_steps=trainer.step,
        size=student.size,
        settings=cast.student_cfg.asset.model_dump(mode="json"),
        views=views.model_dump(mode="json", include={"elevation", "distance", "fovy"}),
        **_library(cast),
    )


def _library(cast) -> dict:
    """What the export of a network that makes assets says beside that."""
    if cast.student_cfg.asset.generator is None:
        return {}
    views = cast.views
    return {"base": cast.teacher_cfg.path, "prompts": views.trained, "held_out": views.held_out}


def write_cards(trainer, folder: Path, results: dict) -> None:
    """Write the cards of an export again, with what was measured since and pictures of the student."""
    if isinstance(trainer.cast.student.backbone, AssetStudent):
        scores = {k: v for k, v in results.get("student", {}).items() if isinstance(v, float)}
        kinds = (".ply", ".glb", ".safetensors", ".splat")
        files = sorted(p.name for p in folder.iterdir() if p.suffix in kinds)
        write_text(folder / "README.md", card(asset_info(trainer), files, scores))
        return
    teacher, _ = as_exported(trainer.cast.teacher, trainer.cast.student)
    pictures = Path(trainer.folder) / "samples" / "student.png"
    if pictures.is_file() and not is_composite(folder):
        shutil.copyfile(pictures, folder / SAMPLES)
    write.write_cards(folder, teacher, results, read_command(Path(trainer.folder)))


def is_composite(folder: Path) -> bool:
    """Whether an export is of several students, each in a folder of its own."""
    info = read_info(folder, "export")
    return info is not None and info.num_students > 0
