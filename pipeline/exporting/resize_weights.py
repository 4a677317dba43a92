"""The weights of Pillow's resize along one axis, as nodes of a graph: they depend on the size of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

from convline.images import Resample
from pipeline.exporting.graph_values import Value

SUPPORT = {"box": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}  # of Pillow's filters, to either side
WEIGHT_BITS = 22  # after the point, as Pillow's for bytes
HALF = 2.0 ** (WEIGHT_BITS // 2)


@dataclass(frozen=True)
class Axis:
    """One axis of a resize: `length` pixels become `resized`, of which `target` pixels from `offset` on are kept.

    All but `target` and `filter` are scalars of int64 in the graph. Kept pixels beyond the image are black.
    """

    length: Value
    resized: Value
    offset: Value
    target: int
    filter: Resample

    @property
    def scale(self) -> Value:
        return self.length.to("float64") / self.resized.to("float64")

    def pixels_read(self) -> tuple[Value, Value]:
        """The range of pixels, from the first to the end, that holds all those on which the kept pixels depend."""
        reach = self.scale.at_least(1) * (SUPPORT[self.filter] + 1)
        first = (self.offset.to("float64") * self.scale - reach).floor().to("int64").at_least(0)
        end = ((self.offset + self.target).to("float64") * self.scale + reach).floor().to("int64").at_most(self.length)
        return first, end

    def weights(self) -> tuple[Value, Value]:
        """The weight of each pixel read (columns) in each kept pixel (rows), times 2^22: high * 2^11 + low.

        Both are whole numbers in float32. Products with bytes, and the sums of 32 of them, are exact in float32.
        """
        first, end = self.pixels_read()
        kept = self.offset.range_to(self.offset + self.target).reshaped(-1, 1)
        centre = (kept.to("float64") + 0.5) * self.scale
        position = first.range_to(end).to("float64").reshaped(1, -1)
        one = self.scale.nodes.constant(1, "float64")
        weight = _filter((position - centre + 0.5) * (one / self.scale.at_least(1)), self.filter)
        if self.filter == "box":  # elsewhere the filter is 0 at the ends of its window; here rounding decides
            support = self.scale.at_least(1) * SUPPORT["box"]
            is_within = (position >= (centre - support + 0.5).floor()) & (position < (centre + support + 0.5).floor())
            weight = is_within.where(weight, 0)
        share = weight / weight.sum_of_rows()
        is_inside = (kept >= 0) & (kept < self.resized)
        whole = (is_inside.where(share, 0) * HALF**2 + 0.5).floor()
        high = (whole / HALF).floor()
        return high.to("float32"), (whole - high * HALF).to("float32")


def _filter(x: Value, name: Resample) -> Value:
    """Pillow's filter functions, in float64 and with the same order of operations."""
    if name == "box":
        return ((x > -0.5) & (x <= 0.5)).to("float64")
    distance = x.unary("Abs")
    if name == "bilinear":
        return (-distance + 1).at_least(0)
    if name == "bicubic":
        near = (distance * 1.5 - 2.5) * distance * distance + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
        return (distance < 1).where(near, (distance < 2).where(far, 0))
    return ((x >= -3) & (x < 3)).where(_sinc(x) * _sinc(x / 3), 0)


def _sinc(x: Value) -> Value:
    angle = x * math.pi
    return x.equals(0).where(x.nodes.constant(1, "float64"), angle.unary("Sin") / angle)
