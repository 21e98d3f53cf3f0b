"""What every section of a run's configuration is made of."""

from typing import Annotated, Any, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from fastgen.core.paths import expand

UserPath = Annotated[str, AfterValidator(expand)]
"""a path whose leading ~ is the home folder"""


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
