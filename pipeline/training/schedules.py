"""Learning-rate schedules, with the names and options that recipes give them.

To add one, write a section here and add it to `ScheduleSection`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.training.recipe_section import RecipeSection


class Constant(RecipeSection):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"

    def factor(self, step: int, steps: int) -> float:  # noqa: ARG002
        """What the learning rate is multiplied by at `step` of `steps`."""
        return 1.0


class Cosine(RecipeSection):
    """Half a cosine from 1 to `floor`."""

    name: Literal["cosine"]
    floor: NonNegativeFloat = 0.0

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` of `steps`."""
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * step / steps)) / 2


class Exponential(RecipeSection):
    """`rate` to the power of step / `every`; with `staircase` the quotient is rounded down.

    TensorFlow's `tf.train.exponential_decay`.
    """

    name: Literal["exponential"]
    rate: PositiveFloat
    every: PositiveInt
    staircase: bool = True

    def factor(self, step: int, steps: int) -> float:  # noqa: ARG002
        """What the learning rate is multiplied by at `step` of `steps`."""
        return self.rate ** (step // self.every if self.staircase else step / self.every)


class Linear(RecipeSection):
    """Rises linearly to 1 over `warmup` steps, then falls linearly to `floor` at the end."""

    name: Literal["linear"]
    warmup: NonNegativeInt = 0
    floor: NonNegativeFloat = 0.0

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.floor + (1 - self.floor) * (steps - step) / max(1, steps - self.warmup)


ScheduleSection = Annotated[Constant | Cosine | Exponential | Linear, Field(discriminator="name")]
