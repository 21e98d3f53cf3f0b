"""fastgen: turn slow diffusion and flow generators into one- to eight-step ones.

Names are imported on first use, so `import fastgen` needs neither diffusers nor transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "distill": "fastgen.cli.python_api",
    "load_student": "fastgen.cli.python_api",
    "Run": "fastgen.cli.python_api",
    "Interrupted": "fastgen.cli.python_api",
    "UserError": "fastgen.core.errors",
    "Schedule": "fastgen.diffusion.schedules",
    "VP": "fastgen.diffusion.schedules",
    "EDM": "fastgen.diffusion.schedules",
    "Flow": "fastgen.diffusion.schedules",
    "TrigFlow": "fastgen.diffusion.schedules",
    "Backbone": "fastgen.networks.backbone",
    "Role": "fastgen.roles.roles",
    "Student": "fastgen.roles.roles",
    "StudentSpec": "fastgen.roles.roles",
    "Objective": "fastgen.objectives.base",
    "ObjectiveConfig": "fastgen.objectives.base",
    "RunConfig": "fastgen.config.run",
    "Trainer": "fastgen.training.trainer",
    "make_cast": "fastgen.training.assembly",
    "make_trainer": "fastgen.training.assembly",
    "load_teacher": "fastgen.networks.load",
    "load_export": "fastgen.export.load",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
