"""The settings to start from for a method on a teacher, where nobody has written a YAML file yet.

A bundled teacher has its own recipes. Any other one gets the settings of the released model that it is most
like (configs/teachers/) under the published ones of the method (configs/objectives/), changed only where the
two cannot go together: a sampler or time list made for another noise schedule, an input that the network has
not. Every such change is a note.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastgen.config.catalogue import bundled, methods, teacher_path, teachers
from fastgen.config.parse import BUNDLED, merge, read_files
from fastgen.core.errors import UserError, suggest
from fastgen.core.paths import config, is_analytic
from fastgen.core.reading import read_json
from fastgen.core.yaml_text import dump_yaml, read_yaml
from fastgen.diffusion.schedules import VP
from fastgen.families.registry import detect
from fastgen.networks.files import hub_folder
from fastgen.networks.load import TeacherOptions, load_teacher
from fastgen.networks.teacher import Teacher
from fastgen.objectives import REGISTRY, requirements_of

OWN_SIZE = ("height", "width", "num_frames", "layout")
"""teacher keys of a released model that a folder of one's own says better itself"""


@dataclass
class Recommendation:
    """A short recipe, and the values that it stands for."""

    method: str
    path: str
    """teacher.path"""
    files: list[str]
    """bundled configs, merged left to right"""
    own: dict[str, Any] = field(default_factory=dict)
    """what is set over them"""
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        return merge(read_files(self.files), self.own)

    def text(self, flags: dict[str, Any]) -> str:
        """A YAML file that starts the same run again, with the flags that were given."""
        head = [f"# {self.method} on {self.path}, as `fastgen train --method` recommends it", *self.notes]
        lines = "\n# ".join(head)
        return f"{lines}\n{dump_yaml({'base': self.files, **merge(self.own, flags)})}"


def recommend(method: str, teacher: str, shapes: Teacher | None = None) -> Recommendation:
    """The recommended settings of a method for a teacher: a bundled name, a hub id or a folder. `shapes` is
    that teacher without its weights, where it has been loaded already.
    """
    if method not in REGISTRY:
        unknown = f"found {method[:40]!r}{suggest(method, REGISTRY)}"
        raise UserError("--method", unknown, f"allowed: {', '.join(methods())}")
    path, file = find_teacher(teacher)
    if path.startswith("assets:"):
        found = _recipe_of(method, file.stem if file else "", path)
        if found.files[0].startswith(f"{BUNDLED}recipes/"):
            return found
    else:
        found = _of_released(method, path, file)
    _reconcile(found, shapes or load_shapes(found.values))
    return found


def find_teacher(name: str) -> tuple[str, Path | None]:
    """(teacher.path, its config or that of the released model it is most like) of a name, hub id or path."""
    for file in bundled("teachers"):
        if name in (file.stem, teacher_path(file)):
            if name == file.stem and Path(name).is_dir():
                found = f"{name} is a teacher of `fastgen list teachers` and a folder here"
                raise UserError("--teacher", found, f"write ./{name} or {teacher_path(file)}")
            return teacher_path(file), file
    if is_analytic(name):
        return name, None
    try:
        folder = hub_folder(name, False)
    except UserError as error:
        known = [*teachers(), *(f.stem for f in bundled("teachers"))]
        found = f"{error.found}{suggest(name, known)}"
        raise UserError(
            "--teacher", found, "a name of `fastgen list teachers`, or a diffusers folder"
        ) from None
    return name, _most_alike(folder)


def _most_alike(folder: Path) -> Path | None:
    """The config of the released model of the same family whose network has most settings in common."""
    index, own = _configs(folder)
    if not own:
        return None
    family, found = detect(index, own), []
    for file in bundled("teachers"):
        layout = read_yaml(file, "--config")["teacher"].get("layout")
        if layout and detect(layout.get("index", {}), layout["net"]) is family:
            found.append((sum(own.get(k) == v for k, v in layout["net"].items()), file))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _configs(folder: Path) -> tuple[dict, dict]:
    """(model_index.json, config.json of the denoiser) of a diffusers folder; empty where there is none."""
    index = folder / "model_index.json"
    parts = (folder / part / "config.json" for part in ("unet", "transformer", "prior"))
    part = next((p for p in parts if p.is_file()), None)
    found = read_json(index, "--teacher") if index.is_file() else {}
    return found, read_json(part, "--teacher") if part else {}


def _recipe_of(method: str, stem: str, path: str) -> Recommendation:
    """The recipe of a bundled teacher: its plain one, else the first variant that needs no other run."""
    candidates = sorted(bundled("recipes"), key=lambda f: len(f.stem))
    for file in candidates:
        if f"{file.stem}_".startswith(f"{stem}_{method}_"):
            student = read_files([str(file)]).get("student") or {}
            if not student.get("init"):
                return Recommendation(method, path, [f"{BUNDLED}recipes/{file.name}"])
    files = [f"{BUNDLED}bases/{stem}.yaml", f"{BUNDLED}objectives/{method}.yaml"]
    base = read_files(files[:1])
    own = {"teacher": dict(base["teacher"]), "data": {"name": base["data"]["name"]}}
    notes = ["no recipe was tuned for this pair: the published settings of the method"]
    return Recommendation(method, path, files, own, notes)


def _of_released(method: str, path: str, file: Path | None) -> Recommendation:
    """Settings of the released model (or of the one most like it) under those of the method."""
    objective = f"{BUNDLED}objectives/{method}.yaml"
    files = [objective] if has_config(method) else []
    own: dict[str, Any] = {"teacher": {"path": path}, "data": {"name": ""}}
    notes = []
    if file is not None:
        files.insert(0, f"{BUNDLED}teachers/{file.name}")
        settings = read_files(files[:1])["teacher"]
        if path != teacher_path(file):
            notes.append(f"settings of {file.stem}, the released model most like it")
            own["teacher"] |= {k: None for k in OWN_SIZE if k in settings}
        own["teacher"] |= {k: v for k, v in settings.items() if k in ("guidance", "num_steps")}
    elif not is_analytic(path):
        notes.append("no released model of this family has settings here: general ones")
        files.insert(0, f"{BUNDLED}bases/released.yaml")
    if not has_config(method):
        own["objective"] = {"name": method}
    return Recommendation(method, path, files, own, notes)


def has_config(method: str) -> bool:
    """Whether configs/objectives/ has published settings of a method; plugins have none."""
    return (config("objectives") / f"{method}.yaml").is_file()


def load_shapes(values: dict[str, Any]) -> Teacher:
    """The teacher of these values without its weights."""
    names = {f.name for f in fields(TeacherOptions)}
    return load_teacher(**{k: v for k, v in values["teacher"].items() if k in names}, weights=False)


def _reconcile(found: Recommendation, teacher: Teacher) -> None:
    """Change what the two sets of settings say and this teacher, or this method, cannot do."""
    values = found.values
    student = values.get("student") or {}
    change: dict[str, Any] = {}
    family = teacher.backbone.family
    if family is None and student.get("kind") == "lora":
        change["kind"] = "full"
    if family is not None and not family.supports_guidance and values["teacher"].get("guidance", 1) != 1:
        found.own["teacher"] |= {"guidance": 1.0}
        found.notes.append("teacher.guidance 1: this network takes its guidance as an input")
    if student.get("sampler") == "tcd" and not isinstance(teacher.schedule, VP):
        change |= {"sampler": "ode", "gamma": 0.0}
    if student.get("timesteps") and not _has_times(teacher, student["timesteps"]):
        change["timesteps"] = []
    span, w = student.get("guidance_embedding"), values["teacher"].get("guidance", 1.0)
    if span and not (_takes_guidance(teacher, student) and span[0] <= w <= span[1]):
        change["guidance_embedding"] = None
    objective = REGISTRY[found.method].config.model_validate(values["objective"])
    change |= _steps({"num_steps": 1, "sampler": "renoise", **student, **change}, objective)
    if family is not None and family.frame_times and requirements_of(objective).blocks:
        change["causal"] = {"block": next(n for n in (3, 2, 1) if teacher.codec.shape[1] % n == 0)}
    if change:
        found.own["student"] = change
        said = ", ".join(f"student.{k} {v}" for k, v in change.items())
        found.notes.append(f"changed for this pair: {said}")


def _has_times(teacher: Teacher, times: list) -> bool:
    """Whether these are times of the teacher's schedule, and not of another kind's."""
    schedule = teacher.schedule
    whole = not isinstance(schedule, VP) or all(t == round(t) for t in times)
    return whole and all(schedule.t_min < t <= schedule.t_max for t in times)


def _takes_guidance(teacher: Teacher, student: dict) -> bool:
    """Whether a student of this network can take the guidance scale as an input."""
    family = teacher.backbone.family
    if family is None or not family.guidance_layers:
        return False
    return not family.guidance_option or bool(student.get(family.guidance_option))


def _steps(student: dict, objective) -> dict[str, Any]:
    """Number of steps and sampler, the nearest to the given that the method trains."""
    why_not = requirements_of(objective).why_not_sampled
    own = len(student.get("timesteps") or ()) or student["num_steps"], student["sampler"]
    for num in dict.fromkeys((own[0], 1, 2, 4, 8, 20)):
        for sampler in dict.fromkeys((own[1], "renoise", "ode")):
            if why_not(num, sampler):
                continue
            if requirements_of(objective).step_end and num > 1 and sampler != "ode":
                continue
            wanted = {"num_steps": num, "sampler": sampler}
            return {k: v for k, v in wanted.items() if v != dict(zip(wanted, own))[k]}
    return {}
