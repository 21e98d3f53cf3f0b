"""The same from Python: `fastgen.distill(...)` is `fastgen train`, `fastgen.load_student(...)` is `fastgen
sample`; what they take and refuse is what the commands take and refuse (docs/python.md).
"""

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastgen.cli.demo_model import DemoModel, Request
from fastgen.cli.train_start import recommended_config
from fastgen.config.parse import merge
from fastgen.core import interrupt
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.data.bundled import NAMES
from fastgen.data.media import to_pil
from fastgen.evaluation.run_files import check_run

Pairs = Iterable[tuple[Any, str]]
"""pictures (PIL) with their captions"""


class Student(DemoModel):
    """An export, a LoRA file or a teacher, ready to draw."""

    def __call__(
        self,
        prompt: str = "",
        *,
        label: str | int = "",
        image: str | Path = "",
        steps: int = 0,
        seed: int = 0,
        num_images: int = 1,
        guidance: float | None = None,
        weight: float = 1.0,
    ) -> list:
        """Pictures (PIL), or of a clip its frames; picture i draws all its noise from seed + i. `steps` 0 is
        what it was trained for, `weight` that of a LoRA.
        """
        request = Request(
            prompt=prompt,
            label=str(label),
            image=str(image),
            steps=steps or self.steps,
            seed=seed,
            num_images=num_images,
            guidance=guidance,
            weight=weight,
        )
        images = self.draw(request)[0].images
        return [[to_pil(f) for f in one.unbind(1)] if one.ndim == 4 else to_pil(one) for one in images]


def load_student(path: str | Path, base: str = "", device: str = "", dtype: str = "fp32") -> Student:
    """The student of an export folder, LoRA file or run folder (or a teacher): call it to draw. UserError for
    anything else.
    """
    return Student(str(path), base, device, dtype)


class Run:
    """A finished run of `distill`, or one on disk: Run("runs/quickstart")."""

    def __init__(self, folder: str | Path):
        self.folder = check_run(Path(folder), "run")

    @property
    def export(self) -> Path:
        """The folder that a user ships."""
        return self.folder / "export"

    @property
    def results(self) -> dict[str, Any]:
        """What was measured, as in results.json; empty where nothing was."""
        file = self.folder / "results.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def student(self, device: str = "") -> Student:
        """The trained student: call it to draw."""
        return load_student(self.export, device=device)

    def pipeline(self, **parts: Any) -> Any:
        """A diffusers pipeline with the student in it; `parts` go to from_pretrained. Call it with
        `**run.call_arguments`. Networks without a pipeline (class labels) are drawn by `student()`.
        """
        from fastgen.export.pipeline import load_pipeline

        return load_pipeline(self.export, **parts)

    @property
    def call_arguments(self) -> dict[str, Any]:
        """Steps, guidance and what else the pipeline's call needs to do what the student was trained for."""
        from fastgen.export.pipeline import call_arguments

        return call_arguments(self.export)

    def report(self) -> Path:
        """Write the report page again; its file."""
        from fastgen.evaluation.report import write_report

        return write_report(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


def distill(
    teacher: Any = "assets:teachers/fashion",
    method: str = "dmd2",
    data: str | Path | list[str] | Callable[[], Pairs] | None = None,
    student: str = "",
    steps: int = 0,
    *,
    output_dir: str | Path = "",
    max_steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Distil a teacher as `fastgen train --method METHOD --teacher TEACHER` does; the finished run.

    teacher: a name of `fastgen list teachers`, a folder, a hub id, or a pipeline object of diffusers, which
    is saved beside the run. data: a bundled set, a folder of pictures, latents or a saved data
    set, a table (.csv, .jsonl, .parquet), .tar archives, a .txt file of prompts, a list of
    prompts, or a function that returns (picture, caption) pairs, saved beside the run too; None is the
    recipe's own. student: "lora" or "full"; steps: how many it takes; both the recipe's where not given.
    settings: any other keys of the config, nested. Raises UserError for what cannot work, NotFinite where
    numbers are not, and Interrupted where a signal stopped it.
    """
    name = str(output_dir)
    over: dict[str, Any] = {"output_dir": name} if name else {}
    path = _teacher_path(teacher, name)
    over = merge(over, {"data": _data_section(data, name)} if data is not None else {})
    chosen = ({"kind": student} if student else {}) | ({"num_steps": steps} if steps else {})
    over = merge(merge(over, {"student": chosen} if chosen else {}), dict(settings or {}))
    known = Namespace(method=method, teacher=path, config=[], max_steps=max_steps, dry_run=False)
    known.resume, known.overwrite, known.insist, known.allow_changed = resume, overwrite, False, []
    known.command = ["fastgen", "train", "--config", "recipe.yaml"]
    return _run(known, over)


class Interrupted(RuntimeError):
    """A signal stopped a run; says which step is saved. `distill(..., resume=True)` goes on."""


def _run(known: Namespace, over: dict[str, Any]) -> Run:
    from fastgen.cli.train import run
    from fastgen.cli.train_start import refused
    from fastgen.core.console import quiet
    from fastgen.core.errors import NotFinite

    quiet()
    with interrupt.handled():
        try:
            cfg = recommended_config(known, over)
            code = run(cfg, known)
        except UserError as error:
            raise refused(error, known) from None
        except interrupt.Stopped as stop:
            raise Interrupted(str(stop)) from None
    if code == 3:
        raise NotFinite(f"{cfg.output_dir}: the run stopped at numbers that are not finite")
    if code:
        raise Interrupted(f"{cfg.output_dir}: stopped with code {code}; resume=True goes on")
    return Run(cfg.output_dir)


def _teacher_path(teacher: Any, output_dir: str) -> str:
    """A path of a teacher; a pipeline object is saved beside the run."""
    if isinstance(teacher, (str, Path)):
        return str(teacher)
    if not hasattr(teacher, "save_pretrained"):
        found = f"found a {type(teacher).__name__}"
        raise UserError("teacher", found, "give a folder, a name, a hub id or a pipeline of diffusers")
    place = _beside(output_dir, "teacher")
    teacher.save_pretrained(place, safe_serialization=True)
    return str(place)


def _kind_of_path(data: str) -> str:
    """The key of the data section that a path is for, by its end and by what a folder holds."""
    ends = {".txt": "prompts", ".csv": "table", ".jsonl": "table", ".parquet": "table", ".tar": "shards"}
    folder = Path(data).expanduser()
    if (folder / "manifest.json").is_file():
        return "latents"
    saved = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    return ends.get(folder.suffix, "dataset" if saved else "images")


def _data_section(data: Any, output_dir: str) -> dict[str, str]:
    """The data section for what was given."""
    if callable(data):
        return {"images": str(_save_pairs(data(), _beside(output_dir, "data")))}
    if isinstance(data, (str, Path)):
        if str(data) in NAMES:
            return {"name": str(data)}
        return {_kind_of_path(str(data)): str(data)}
    if isinstance(data, (list, tuple)) and data and all(isinstance(p, str) and p.strip() for p in data):
        place = _beside(output_dir, "data") / "prompts.txt"
        write_text(place, "\n".join(" ".join(p.split()) for p in data) + "\n")
        return {"prompts": str(place)}
    found = f"found a {type(data).__name__}"
    raise UserError("data", found, "give a folder, a set's name, prompts, or a function of picture pairs")


def _save_pairs(pairs: Pairs, folder: Path) -> Path:
    """Pictures as files with their captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (picture, text) in enumerate(pairs):
        picture.save(folder / f"{i:06d}.png")
        rows.append(json.dumps({"file_name": f"{i:06d}.png", "text": str(text)}))
    if not rows:
        raise UserError("data", "the function gave no picture", "let it return (picture, caption) pairs")
    write_text(folder / "metadata.jsonl", "\n".join(rows) + "\n")
    return folder


def _beside(output_dir: str, what: str) -> Path:
    """A folder beside that of the run, which an export may name as its base."""
    if not output_dir:
        raise UserError("output_dir", "none given", f"name the run's folder: its {what} is kept beside it")
    place = Path(output_dir)
    return place.with_name(f"{place.name}-{what}")
