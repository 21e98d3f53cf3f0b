"""A run as its export describes it: what its last stage trained, and the files of `fastgen.export`."""

from pathlib import Path

import torch

from fastgen.export.model_card import read_command
from fastgen.export.write import Trained, export_student
from fastgen.objectives import requirements_of

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def trained(trainer) -> Trained:
    """The student of a run as it stands, whose last stage says how it is sampled."""
    cfg = trainer.cfg
    last = cfg.all_stages()[-1].objective
    needs, student = requirements_of(last), trainer.cast.student
    chosen = cfg.train.export_dtype
    half = chosen == "no" and not needs.few_step  # a teacher's weights, as they are published
    return Trained(
        teacher=trainer.cast.teacher,
        student=student,
        objective="+".join(dict.fromkeys(s.objective.name for s in cfg.all_stages())),
        few_step=needs.few_step,
        takes=lambda num: not needs.why_not_sampled(num, student.sampler),
        guidance=needs.learned_guidance(cfg.student_guidance),
        nasa_scale=needs.negative_prompt_scale,
        base=cfg.teacher.path,
        teacher_steps=cfg.teacher.num_steps,
        training_steps=trainer.step,
        run_name=Path(cfg.output_dir).name,
        command=read_command(Path(trainer.folder)),
        dtype=torch.float16 if half else DTYPES[chosen],
    )


def export_run(trainer, folder: Path, results: dict) -> Path:
    """Write the student of a run (call inside the EMA swap); `results` go on its card."""
    return export_student(trained(trainer), folder, results)
