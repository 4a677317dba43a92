"""What options of networks may be; recipes are checked against it."""

from typing import Annotated

from annotated_types import Ge, Gt, Lt

Count = Annotated[int, Gt(0)]
Size = Annotated[int, Ge(0)]
Deviation = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]
