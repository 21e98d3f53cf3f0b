"""fastgen: turn slow diffusion and flow generators into one- to eight-step ones.

Names are imported on first use, so `import fastgen` needs neither diffusers nor transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "Schedule": "fastgen.schedules",
    "VP": "fastgen.schedules",
    "EDM": "fastgen.schedules",
    "Flow": "fastgen.schedules",
    "TrigFlow": "fastgen.schedules",
    "Backbone": "fastgen.backbones.base",
    "Role": "fastgen.roles",
    "Student": "fastgen.roles",
    "Objective": "fastgen.objectives.base",
    "ObjectiveConfig": "fastgen.objectives.base",
    "RunConfig": "fastgen.config",
    "Trainer": "fastgen.trainer",
    "load_teacher": "fastgen.backbones",
    "load_export": "fastgen.export",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
