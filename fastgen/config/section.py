"""What all sections of a configuration share: how they are read, and the bounds of their numbers."""

from typing import Annotated, Any, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fastgen.core.errors import UserError
from fastgen.core.paths import expand

UserPath = Annotated[str, AfterValidator(expand)]
"""a path whose leading ~ is the home folder"""

MOST = 2**63 - 1
"""largest whole number and seed"""
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _wrap(cls, values: Any) -> Any:
        """A single value for a list is the list of that value."""
        if not isinstance(values, dict):
            return values
        lists = {n for n, f in cls.model_fields.items() if get_origin(f.annotation) is tuple}
        texts = {n for n, f in cls.model_fields.items() if f.annotation is str}
        whole = {k: str(v) for k, v in values.items() if k in texts and type(v) is int}
        return {
            k: [v] if k in lists and not isinstance(v, (list, tuple, type(None))) else v
            for k, v in (values | whole).items()
        }


def check_booleans(given: Any, kept: Any, key: str = "") -> None:
    """A UserError where a config gave true, false, yes or no for what is kept as a number: 1 is not meant."""
    if isinstance(given, bool) and type(kept) in (int, float):
        raise UserError(key, f"found {str(given).lower()}", "give a number")
    if isinstance(given, dict) and isinstance(kept, BaseModel):
        for name in type(kept).model_fields.keys() & given.keys():
            check_booleans(given[name], getattr(kept, name), f"{key}.{name}" if key else name)
    elif isinstance(given, (list, tuple)) and isinstance(kept, tuple):
        for i, pair in enumerate(zip(given, kept)):
            check_booleans(*pair, f"{key}.{i}")


def check_numbers(section: BaseModel, prefix: str = "") -> None:
    """Raises a ValueError naming the first number, anywhere in a section, that no computation can use: whole
    ones beyond 64 bits, others outside the arithmetic of float32.
    """
    for name in type(section).model_fields:
        value = getattr(section, name)
        key = f"{prefix}{name}"
        for i, item in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if isinstance(item, BaseModel):
                check_numbers(item, f"{key}." if i is None else f"{key}.{i}.")
            elif isinstance(item, int) and abs(item) > MOST:
                raise ValueError(f"{key}: found {item}; at most {MOST}, in 64 bits")
            elif isinstance(item, float) and not abs(item) <= 1e30:  # also not a number
                raise ValueError(f"{key}: found {item:g}; at most 1e30, well inside float32")
