"""The base of every recipe section."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable; a field that is not declared is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
