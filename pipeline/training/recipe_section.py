"""The base class of every recipe section: strict types, no unknown fields."""

from pydantic import BaseModel, ConfigDict


class RecipeSection(BaseModel):
    """Immutable; refuses unknown fields, values of another type, and infinite numbers and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
