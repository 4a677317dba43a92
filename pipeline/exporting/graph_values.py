"""Write ONNX nodes as arithmetic: `(position + 0.5) * scale` adds an Add and a Mul to a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


@dataclass
class Nodes:
    """The nodes written so far; their names and their outputs begin with `prefix`."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def value(self, operator: str, *inputs: Value, dtype: str, **attributes: Any) -> Value:
        """The output, of type `dtype`, of a new node."""
        name = f"{self.prefix}{operator}_{len(self.nodes)}"
        names = [value.name for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [name], name=name, **attributes))
        return Value(self, name, dtype)

    def constant(self, number: Any, dtype: str) -> Value:
        """A number, or a list of numbers."""
        return self.value("Constant", dtype=dtype, value=numpy_helper.from_array(np.array(number, dtype)))

    def concat(self, *lists: Value) -> Value:
        return self.value("Concat", *lists, dtype=lists[0].dtype, axis=0)

    def either(self, condition: Value, yes: Callable[[Nodes], Value], no: Callable[[Nodes], Value]) -> Value:
        """What `yes` computes if the condition, one boolean, holds, else what `no` computes: only one of them runs.

        Both get the nodes to write to, and return a tensor of four axes of the same type.
        """
        branches, dtype = {}, ""
        for name, compute in (("then_branch", yes), ("else_branch", no)):
            nodes = Nodes(f"{self.prefix}{name}_{len(self.nodes)}/")
            result = compute(nodes)
            dtype = result.dtype
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            output = helper.make_tensor_value_info(result.name, kind, [None] * 4)
            branches[name] = helper.make_graph(nodes.nodes, name, [], [output])
        return self.value("If", condition, dtype=dtype, **branches)


@dataclass(frozen=True)
class Value:
    """A tensor in a graph; `dtype` is its NumPy name. A number beside it becomes a constant of the same type."""

    nodes: Nodes
    name: str
    dtype: str

    def within(self, nodes: Nodes) -> Value:
        """The same tensor, for use in a branch: what is computed from it is written to `nodes`."""
        return replace(self, nodes=nodes)

    def __add__(self, other: Value | float) -> Value:
        return self._with("Add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._with("Sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._with("Mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._with("Div", other)

    def __floordiv__(self, other: Value | float) -> Value:
        """Of integers that are not negative: ONNX truncates, Python rounds down."""
        assert self.dtype == "int64"
        return self._with("Div", other)

    def __matmul__(self, other: Value) -> Value:
        return self._with("MatMul", other)

    def __neg__(self) -> Value:
        return self.unary("Neg")

    def __and__(self, other: Value) -> Value:
        return self._with("And", other)

    def __lt__(self, other: Value | float) -> Value:
        return self._with("Less", other, "bool")

    def __le__(self, other: Value | float) -> Value:
        return self._with("LessOrEqual", other, "bool")

    def __gt__(self, other: Value | float) -> Value:
        return self._with("Greater", other, "bool")

    def __ge__(self, other: Value | float) -> Value:
        return self._with("GreaterOrEqual", other, "bool")

    def equals(self, other: Value | float) -> Value:
        return self._with("Equal", other, "bool")

    def at_least(self, other: Value | float) -> Value:
        return self._with("Max", other)

    def at_most(self, other: Value | float) -> Value:
        return self._with("Min", other)

    def where(self, yes: Value, no: Value | float) -> Value:
        """`yes` where this condition holds, else `no`."""
        no = no if isinstance(no, Value) else self.nodes.constant(no, yes.dtype)
        return self.nodes.value("Where", self, yes, no, dtype=yes.dtype)

    def unary(self, operator: str, **attributes: Any) -> Value:
        return self.nodes.value(operator, self, dtype=self.dtype, **attributes)

    def floor(self) -> Value:
        return self.unary("Floor")

    def rounded(self) -> Value:
        """Halves to even, as Python's `round`."""
        return self.unary("Round")

    def to(self, dtype: str) -> Value:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.nodes.value("Cast", self, dtype=dtype, to=kind)

    def axis(self, index: int) -> Value:
        """The length of an axis, a scalar of int64."""
        length = self.nodes.value("Shape", self, dtype="int64", start=index, end=index + 1)
        return length.unary("Squeeze")

    def reshaped(self, *shape: int) -> Value:
        return self.nodes.value("Reshape", self, self.nodes.constant(shape, "int64"), dtype=self.dtype)

    def sum_of_rows(self) -> Value:
        """[rows, 1] of [rows, columns]."""
        return self.nodes.value("ReduceSum", self, self.nodes.constant([1], "int64"), dtype=self.dtype, keepdims=1)

    def range_to(self, end: Value) -> Value:
        """The integers from this scalar up to `end`, which is left out."""
        return self.nodes.value("Range", self, end, self.nodes.constant(1, "int64"), dtype="int64")

    def _with(self, operator: str, other: Value | float, dtype: str | None = None) -> Value:
        other = other if isinstance(other, Value) else self.nodes.constant(other, self.dtype)
        return self.nodes.value(operator, self, other, dtype=dtype or self.dtype)
