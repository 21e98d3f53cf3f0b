"""What an export says about itself: one typed record in fastgen.json, and in the header of a LoRA file."""

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fastgen.core.errors import UserError
from fastgen.core.reading import read_json

FILE = "fastgen.json"
FORMAT = 1
"""counts up whenever a field changes its name or its meaning"""


@dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """Everything that sampling an export needs, so that nobody has to remember it."""

    fastgen_version: str
    name: str
    """of the export: <teacher>-<method>-<N>step"""
    objective: str
    """methods of all stages, joined by +"""
    student_kind: str
    """full, lora or guidance_adapter"""
    base: str
    """path of the teacher; empty for a full network that nothing was distilled into"""
    training_steps: int
    steps: int
    """to sample it in: the length of `times`, or what its teacher takes"""
    times: tuple[float, ...] | None
    """of a few-step student's steps, noise first; None for a generator that is sampled like a teacher"""
    sampler: str
    gamma: float
    grid: int
    """steps of the time grid that the student was trained on; 0: on its own times alone"""
    scheduler: dict[str, Any]
    """config of the diffusers scheduler to sample with"""
    timestep_arguments: dict[str, Any]
    """keywords of the scheduler's set_timesteps (and of the pipeline's call) beyond the number of steps"""
    step_arguments: dict[str, Any]
    """keywords of the scheduler's step (and of the pipeline's call)"""
    needs_loop: bool
    """no diffusers scheduler takes these steps; the model card spells out a loop that does"""
    set_on_scheduler: bool
    """the pipeline's call does not take `timestep_arguments`: they are set on the scheduler itself"""
    other_step_counts: dict[str, dict[str, dict[str, Any]]]
    """number of steps -> what to change in the scheduler's config ("scheduler") and what to pass
    ("arguments")"""
    step_lengths: tuple[float, ...] | None
    """value of a two-time network's extra input channel at each step; None for networks with one time"""
    guidance: float
    """scale of the teacher that was learned, or to sample a teacher with"""
    guidance_range: tuple[float, float] | None
    """lowest and highest value that the network's own guidance input was trained for"""
    steps_as_guidance: bool
    """whether that input holds the number of steps instead"""
    embedded_guidance: float | None
    """value of a guidance input that the teacher's own class has"""
    nasa_scale: float
    """of negative prompts by attention (NASA); 0: none"""
    teacher_steps: int
    teacher_scheduler: dict[str, Any]
    teacher_settings: dict[str, Any] = field(default_factory=dict)
    """settings of the run's teacher section that its base is loaded with again: height, width, num_frames,
    embedded_guidance, family
    """
    lora: str = ""
    """file name of the adapter in PEFT layout"""
    guidance_adapter: str = ""
    """file name of the adapters that take the guidance scale; they stand on the base itself"""
    kohya: str = ""
    """file name of the same adapter under kohya's names"""
    example: str = ""
    """a prompt of the run's own data, for the card and the suggested command; empty: the run had none"""
    enlarges: int = 0
    """how many times smaller the picture is that it is shown enlarged (super-resolution); 0: none"""
    fidelity: float | None = None
    """of a student with that knob, what it is told by default: 1 is faithful, towards 0 looks real"""
    fidelity_range: tuple[float, float] | None = None
    """least and highest fidelity that it was trained for; None: it has no such knob"""
    causal: dict[str, int] | None = None
    """of a student that makes clips block after block: latent frames of a `block`, the `window` of blocks
    that its attention spans, and `frames`, `height` and `width` of its latents; None: all at once
    """
    tiles: float = 0.0
    """of a student with masks in tile_masks.json, the tiles that they keep, as a share of dense attention's;
    0: without masks
    """
    num_students: int = 0
    """students in folders of their own, student0 and so on; 0: one student, in this folder"""
    trained_students: tuple[int, ...] = ()
    """which of them the run trained"""

    @property
    def is_student(self) -> bool:
        """Whether it is a few-step student."""
        return self.times is not None

    @property
    def scheduler_class(self) -> str:
        return self.scheduler["_class_name"]

    def to_json(self) -> dict[str, Any]:
        """As a dictionary for json.dumps."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: object, where: str | Path, key: str) -> "ExportInfo":
        """The record in `values`, as json.loads gives them; a UserError of `key` names what `where` lacks."""
        if not isinstance(values, dict):
            found = f"the description of {where} is {_kind(values)}"
            raise UserError(key, found, "give an export as fastgen wrote it")
        if values.get("format") != FORMAT:
            found = f"{where} is in export format {values.get('format')!r}, and this fastgen reads {FORMAT}"
            raise UserError(key, found, "export the run again, or use the fastgen that wrote it")
        try:
            return _checker().validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            wrong = f"is missing in {where}" if first["type"] == "missing" else f"in {where}: {first['msg']}"
            raise UserError(key, f"{name} {wrong}", "export the run again") from None


@cache
def _checker() -> TypeAdapter[ExportInfo]:
    return TypeAdapter(ExportInfo)


def _kind(value: object) -> str:
    """What JSON calls a value."""
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_document(folder: Path, key: str) -> dict[str, Any]:
    """fastgen.json of a folder, {} without one; anything but a JSON object is a UserError of `key`."""
    file = folder / FILE
    if not file.is_file():
        return {}
    return read_json(file, key, "copy the export again; the file may be damaged")


def read_info(folder: Path, key: str) -> ExportInfo | None:
    """What an export folder says about itself; None for a folder that fastgen did not write."""
    document = read_document(folder, key)
    if "export" not in document:
        return None
    return ExportInfo.from_json(document["export"], folder / FILE, key)
