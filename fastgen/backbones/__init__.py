"""Families of diffusers denoisers, and `load_teacher`: a folder (or hub id) to a denoiser with its codec."""

from fastgen.backbones.files import component_class, hub_folder, load_part
from fastgen.backbones.load import Source, Teacher, load_teacher
from fastgen.backbones.registry import FAMILIES, detect
from fastgen.backbones.schedulers import load_scheduler, schedule_of

__all__ = [
    "FAMILIES",
    "Source",
    "Teacher",
    "component_class",
    "detect",
    "hub_folder",
    "load_part",
    "load_scheduler",
    "load_teacher",
    "schedule_of",
]
