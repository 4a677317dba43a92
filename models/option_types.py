"""Types of network options, with their bounds; recipes are checked against them."""

from typing import Annotated

from annotated_types import Ge, Gt, Lt

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
DropoutRate = Annotated[float, Ge(0), Lt(1)]
