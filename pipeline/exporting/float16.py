"""Convert a float32 ONNX graph to float16 (fp16)."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT32, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def to_float16(model: onnx.ModelProto, float32_nodes: Collection[str]) -> onnx.ModelProto:
    """A copy whose weights and activations are float16, except in the nodes named in `float32_nodes`.

    Inputs and outputs keep their types; casts stand only where the precision changes. Inputs that an operator's schema
    does not allow to be float16 stay float32. So do nodes with a constant that float16 cannot hold (such as a smallest
    divisor of 1e-12), and the nodes that read their outputs.
    """
    converted = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph, opset = converted.graph, converted.opset_import[0].version
    outputs = {output.name for output in graph.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    float32_nodes = {*float32_nodes, *_nodes_beyond_float16(graph)}
    nodes: list[onnx.NodeProto] = []

    def in_type(name: str, wanted: int) -> str:
        """The name of a float value in the wanted type; a weight is converted, anything else cast."""
        if types[name] == wanted:
            return name
        other = f"{name}.{'float16' if wanted == FLOAT16 else 'float32'}"
        if other not in types and name in weights:
            weights[other] = numpy_helper.from_array(numpy_helper.to_array(weights[name]).astype(np.float16), other)
        elif other not in types:
            nodes.append(_cast(name, other, wanted))
        types[other] = wanted
        return other

    for node in graph.node:
        float16_inputs = set() if node.name in float32_nodes else _float16_inputs(node, opset)
        for index, name in enumerate(node.input):
            if types.get(name) in (FLOAT32, FLOAT16):
                node.input[index] = in_type(name, FLOAT16 if index in float16_inputs else FLOAT32)
        nodes.append(node)
        if not float16_inputs or node.op_type == "Cast":  # a Cast states the type of its output itself
            continue
        for index, name in enumerate(node.output):
            if name in outputs:
                node.output[index] = f"{name}.float16"
                nodes.append(_cast(node.output[index], name, FLOAT32))
            if types.get(name) == FLOAT32:
                types[node.output[index]] = FLOAT16
    used = {name for node in nodes for name in node.input}
    used_weights = [tensor for name, tensor in weights.items() if name in used]
    for field, values in ((graph.node, nodes), (graph.initializer, used_weights), (graph.value_info, [])):
        # copied, because emptying the field invalidates the values that are in it
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    return converted


def _nodes_beyond_float16(graph: onnx.GraphProto) -> set[str]:
    """The nodes with a weight that overflows, or a single value that becomes 0, in float16; and those that read their
    outputs."""
    beyond = set()
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT32:
            values = numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                rounded = values.astype(np.float16)
            vanishes = values.size == 1 and (rounded == 0).all() and (values != 0).all()
            if vanishes or (np.isinf(rounded) & np.isfinite(values)).any():
                beyond.add(tensor.name)
    names = {node.name for node in graph.node if beyond & set(node.input)}
    outputs = {name for node in graph.node if node.name in names for name in node.output}
    return names | {node.name for node in graph.node if outputs & set(node.input)}


def _cast(name: str, to: str, wanted: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [to], name=f"{to}/Cast", to=wanted)


def _float16_inputs(node: onnx.NodeProto, opset: int) -> set[int]:
    """The indices of a node's inputs that may be float16 and whose type its outputs share."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    allowed = {bound.type_param_str: bound.allowed_type_strs for bound in schema.type_constraints}
    shared = {output.type_str for output in schema.outputs if "tensor(float16)" in allowed.get(output.type_str, ())}
    # the last formal input of an operator like Concat stands for all that follow
    formal = [schema.inputs[min(index, len(schema.inputs) - 1)].type_str for index in range(len(node.input))]
    return {index for index, type_name in enumerate(formal) if type_name in shared}
