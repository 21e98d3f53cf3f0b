"""One module per method; importing this package imports and registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from fastgen.objectives.base import REGISTRY, Objective, ObjectiveConfig, requirements_of

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["REGISTRY", "Objective", "ObjectiveConfig", "requirements_of"]
