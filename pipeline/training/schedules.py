"""Learning-rate schedules, with the names and options that recipes give them.

To add one, write a section here and add it to `ScheduleSection`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pipeline.training.recipe_section import RecipeSection


def _steps_or_fraction(value: int | float) -> int | float:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not (is_count or (isinstance(value, float) and 0 <= value < 1)):
        raise ValueError("must be a number of steps (0, 500) or a fraction of them below 1 (0.1)")
    return value


class _Schedule(RecipeSection):
    """`warmup`: the learning rate rises linearly over this many steps, or this fraction of all; then the schedule
    begins."""

    warmup: Annotated[int | float, BeforeValidator(_steps_or_fraction)] = 0

    def warmup_steps(self, steps: int) -> int:
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps)

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` of `steps`."""
        warmup = self.warmup_steps(steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(step - warmup, max(1, steps - warmup))

    def after_warmup(self, step: int, steps: int) -> float:
        raise NotImplementedError


class Constant(_Schedule):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"

    def after_warmup(self, step: int, steps: int) -> float:  # noqa: ARG002
        return 1.0


class Cosine(_Schedule):
    """Half a cosine from 1 to `floor`."""

    name: Literal["cosine"]
    floor: NonNegativeFloat = 0.0

    def after_warmup(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * step / steps)) / 2


class Exponential(_Schedule):
    """`rate` to the power of step / `every`; with `staircase` the quotient is rounded down.

    TensorFlow's `tf.train.exponential_decay`.
    """

    name: Literal["exponential"]
    rate: PositiveFloat
    every: PositiveInt
    staircase: bool = True

    def after_warmup(self, step: int, steps: int) -> float:  # noqa: ARG002
        return self.rate ** (step // self.every if self.staircase else step / self.every)


class Linear(_Schedule):
    """Falls linearly to `floor` at the end."""

    name: Literal["linear"]
    floor: NonNegativeFloat = 0.0

    def after_warmup(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * (steps - step) / steps


ScheduleSection = Annotated[Constant | Cosine | Exponential | Linear, Field(discriminator="name")]
