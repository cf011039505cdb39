"""Gives the floats of an ONNX file the type that an engine computes in, and keeps in float32 what would lose by it.

A strongly typed builder converts nothing by itself: every tensor has a type in the file, and every change of it is a
Cast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from normfuse.export.narrow_numbers import NUMBERS
from normfuse.export.saving import save_checked
from normfuse.export.wide_nodes import (
    FLOATS,
    MOVES,
    branches,
    captured_by,
    computes_floats,
    ends_floats,
    is_dequantized,
    is_float,
    reason_to_stay,
    scale_of,
    unfit,
    whole_numbers,
)
from normfuse.quant.target import BodyType

__all__ = ["TypedBody", "write_body"]

BFLOAT16_OPSET: Final = 22
"""The first in which convolutions and pools have bfloat16; they compute what they do in 21."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypedBody:
    """What became of a file's nodes: how many compute in the body's type, and which stay in float32, with the reason.

    ``wide`` holds (layer or node, operator, reason); operators that always stay are counted in ``usual``.
    """

    body: BodyType
    nodes: int
    usual: Mapping[str, int]
    wide: tuple[tuple[str, str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        told = [{"layer": layer, "operator": operator, "reason": reason} for layer, operator, reason in self.wide]
        return {"type": self.body.value, "nodes": self.nodes, "usual_float32": dict(self.usual), "float32": told}


def write_body(model: Path, path: Path, body: BodyType, largest: Mapping[str, float]) -> TypedBody:
    """Write a float32 file with another type between its inputs and outputs, which stay float32 (ours).

    1. Norms, softmax, sums of many terms, roots and divisions by what is computed are float32, whatever they read.
    2. So does what reads or writes a tensor that came near the largest number of the type (``largest``), stayed where
       it has few digits, or is computed of integers that it does not count; what reads a constant that it does not
       hold; and what stands in a file's branches reads.
    3. A product of codes computes in float32 where the type does not hold a scale of theirs; every other quantizer has
       scales of the type of the floats beside it. Scales of activations are rounded to the body's type everywhere, so
       that codes and their values agree.
    4. An input that ONNX allows in float32 alone stays so; operators that move numbers follow what they read.

    Args:
        model: the float32 file, of standard operators.
        path: where the typed one goes; external data stands beside it.
        body: the type, not float32.
        largest: the largest magnitude of every float tensor by its name, from calibration; others are trusted.

    Raises:
        onnx.checker.ValidationError: the file would not be valid ONNX.
    """
    read = ir.load(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(read)
    ShapeInferencePass(data_prop=False)(read)
    if body is BodyType.BF16:
        read.graph.opset_imports[""] = max(BFLOAT16_OPSET, read.graph.opset_imports[""])
    found = _Typing(read, body, largest).run()
    save_checked(read, path)
    return found


class _Typing:
    """Changes one model: first the type of every node, then of every tensor at its border."""

    def __init__(self, model: ir.Model, body: BodyType, largest: Mapping[str, float]) -> None:
        self._graph, self._type_of_body, self._largest = model.graph, body, largest
        self._body = NUMBERS[body]
        self._opset = model.graph.opset_imports[""]
        self._reasons = dict[ir.Node, str]()
        self._casts = dict[tuple[ir.Value, ir.DataType], ir.Value]()
        self._values = dict[tuple[ir.Node, ir.DataType], ir.Value]()
        self._captured = {value for node in self._graph for value in captured_by(node)}
        self._names = {value.name for value in _values(self._graph)}
        self._constants = dict[tuple[ir.Value, ir.DataType], ir.Value]()

    def run(self) -> TypedBody:
        whole = whole_numbers(self._graph, self._body, self._largest)
        computing = [node for node in self._graph if computes_floats(node)]
        for node in computing:
            if (reason := reason_to_stay(node, self._body, self._largest, whole, self._captured)) is not None:
                self._reasons[node] = reason
        for node in list(self._graph):
            self._retype(node)
        for output in list(self._graph.outputs):
            self._keep_output(output)
        self._clean()
        usual = Counter(node.op_type for node, reason in self._reasons.items() if not reason)
        told = tuple((_layer(node), node.op_type, reason) for node, reason in self._reasons.items() if reason)
        narrow = len(computing) - len(self._reasons)
        return TypedBody(body=self._type_of_body, nodes=narrow, usual=dict(usual), wide=told)

    def _retype(self, node: ir.Node) -> None:
        if node.op_type == "DequantizeLinear":  # written anew in the type of each reader
            self._retype_shown(node)
            return
        if node.op_type == "QuantizeLinear":
            self._retype_quantizer(node)
            return
        floats = [index for index, value in enumerate(node.inputs) if is_float(value)]
        made = [value for value in node.outputs if value.dtype is ir.DataType.FLOAT]
        if not floats and not made:
            return
        wanted = self._type(node, floats)
        for index in floats:
            allowed = wanted if self._allows(node, index, wanted, of_outputs=False) else ir.DataType.FLOAT
            self._read(node, index, allowed)
        if node.op_type == "Cast" and made:
            node.attributes["to"] = ir.AttrInt64("to", int(wanted))
        for index, value in enumerate(node.outputs):
            if value.dtype is ir.DataType.FLOAT and self._allows(node, index, wanted, of_outputs=True):
                value.type = ir.TensorType(wanted)

    def _retype_shown(self, node: ir.Node) -> None:
        """Let values of codes that stay, being an output or read in branches, be of the scale that the codes have."""
        value, scale = node.outputs[0], node.inputs[1]
        assert scale is not None
        if value in self._captured or value.is_graph_output():
            node.replace_input_with(1, self._scale(scale, ir.DataType.FLOAT))
            self._values[node, ir.DataType.FLOAT] = value

    def _type(self, node: ir.Node, floats: list[int]) -> ir.DataType:
        """Return what a node computes in."""
        if node in self._reasons or any(value in self._captured for value in node.outputs):
            return ir.DataType.FLOAT
        if node.op_type in ("Constant", "ConstantOfShape") or "dtype" in node.attributes:  # the file says their type
            return ir.DataType.FLOAT
        if (node.op_type not in MOVES and not ends_floats(node)) or floats[:1] != [0]:
            return self._body.onnx
        source = node.inputs[0]
        assert source is not None
        if source.const_value is None and not is_dequantized(source):
            assert source.dtype is not None
            return source.dtype
        is_wide = unfit(source, self._body) or self._is_read_wide(node)
        return ir.DataType.FLOAT if is_wide else self._body.onnx

    def _is_read_wide(self, node: ir.Node) -> bool:
        """Return whether a wide node reads what a node makes, at once or moved."""
        readers = [reader for value in node.outputs for reader in value.consumers()]
        return any(each in self._reasons or (each.op_type in MOVES and self._is_read_wide(each)) for each in readers)

    def _retype_quantizer(self, node: ir.Node) -> None:
        """Let a quantizer's scale have the type of what it reads, and a value that the body's type has (3)."""
        source, scale = node.inputs[:2]
        assert source is not None
        assert scale is not None
        if self._body.unfit_scale(scale_of(node)):
            self._read(node, 0, ir.DataType.FLOAT)
        elif source.const_value is not None or is_dequantized(source):
            self._read(node, 0, ir.DataType.FLOAT if unfit(source, self._body) else self._body.onnx)
        source = node.inputs[0]
        assert source is not None
        assert source.dtype is not None
        node.replace_input_with(1, self._scale(scale, source.dtype))

    def _scale(self, scale: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a scale in a type, its value rounded to the body's where that holds it."""
        assert scale.const_value is not None
        exact = scale.const_value.numpy()
        rounded = exact if self._body.unfit_scale(exact) else exact.astype(self._body.numpy)
        kind = self._body.numpy if dtype is self._body.onnx else np.dtype(np.float32)
        return self._constant(scale, rounded.astype(kind), dtype)

    def _read(self, node: ir.Node, index: int, dtype: ir.DataType) -> None:
        """Let a node read an input in a type."""
        value = node.inputs[index]
        assert value is not None
        node.replace_input_with(index, self._in(value, dtype))

    def _in(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a tensor in a type: a constant anew, a dequantizer anew, else behind a Cast."""
        if value.const_value is not None:
            if value.const_value.dtype is dtype:
                return value
            numbers = value.const_value.numpy()
            return self._constant(value, numbers.astype(self._body.numpy), dtype)
        made = value.producer()
        if made is not None and made.op_type == "DequantizeLinear":
            return self._dequantized(made, dtype)
        if value.dtype is dtype:
            return value
        key = (value, dtype)
        if key not in self._casts:
            cast = _node("Cast", [value], {"to": ir.AttrInt64("to", int(dtype))}, like=made)
            self._place(cast, behind=made)
            self._casts[key] = _named(cast, self._name(value, dtype), dtype)
        return self._casts[key]

    def _dequantized(self, node: ir.Node, dtype: ir.DataType) -> ir.Value:
        key = (node, dtype)
        if key not in self._values:
            codes, scale, *zero = node.inputs
            assert scale is not None
            again = _node("DequantizeLinear", [codes, self._scale(scale, dtype), *zero], node.attributes, like=node)
            again.name = f"{node.name}_{_short(dtype)}"
            self._place(again, behind=node)
            self._values[key] = _named(again, self._name(node.outputs[0], dtype), dtype)
        return self._values[key]

    def _constant(self, like: ir.Value, numbers: Any, dtype: ir.DataType) -> ir.Value:
        key = (like, dtype)
        if key not in self._constants:
            name = self._name(like, dtype)
            const = ir.tensor(numbers, dtype=dtype, name=name)
            value = ir.Value(name=name, shape=ir.Shape(numbers.shape), type=ir.TensorType(dtype), const_value=const)
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def _name(self, like: ir.Value, dtype: ir.DataType) -> str:
        """Return a name that no tensor has yet."""
        name = f"{like.name}_{_short(dtype)}"
        while name in self._names:
            name = f"{name}_"
        self._names.add(name)
        return name

    def _place(self, node: ir.Node, *, behind: ir.Node | None) -> None:
        if behind is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(behind, node)

    def _keep_output(self, output: ir.Value) -> None:
        """Let an output of the model be float32 under its name."""
        made = output.producer()
        if made is None or output.dtype not in FLOATS or output.dtype is ir.DataType.FLOAT:
            return
        name, dtype = output.name, output.dtype
        assert dtype is not None
        narrow = self._name(output, dtype)
        cast = _node("Cast", [output], {"to": ir.AttrInt64("to", int(ir.DataType.FLOAT))}, like=made)
        self._place(cast, behind=made)
        kept = cast.outputs[0]
        kept.shape, kept.type = output.shape, ir.TensorType(ir.DataType.FLOAT)
        for index, each in enumerate(self._graph.outputs):
            if each is output:
                self._graph.outputs[index] = kept
        output.name, kept.name, cast.name = narrow, name, f"{name}/Cast"

    def _allows(self, node: ir.Node, index: int, dtype: ir.DataType, *, of_outputs: bool) -> bool:
        """Return whether ONNX allows an input or output of a node in a type (4)."""
        if dtype is ir.DataType.FLOAT or node.domain:
            return dtype is ir.DataType.FLOAT
        schema = onnx.defs.get_schema(node.op_type, self._opset)
        formal = schema.outputs if of_outputs else schema.inputs
        parameter = formal[min(index, len(formal) - 1)]  # the last one may stand for many
        kinds = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
        return f"tensor({_short(dtype)})" in kinds.get(parameter.type_str, [parameter.type_str])

    def _clean(self) -> None:
        """Drop what nobody reads any more: float32 constants and dequantizers that have others in their place."""
        for node in reversed(list(self._graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
        for value in self._graph.initializers.values():
            if not value.is_graph_output():
                value.type = value.shape = None  # the tensor says them


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield all tensors of a graph, those in its branches too."""
    yield from (*graph.inputs, *graph.initializers.values())
    for node in graph.all_nodes():
        yield from node.outputs
        for branch in branches(node):
            yield from (*branch.inputs, *branch.initializers.values())


def _node(operator: str, inputs: list[Any], attributes: Mapping[str, ir.Attr], *, like: ir.Node | None) -> ir.Node:
    """Return a node that belongs to the layer of another."""
    made = ir.Node("", operator, inputs, attributes=list(attributes.values()), num_outputs=1)
    if like is not None:
        made.metadata_props.update(like.metadata_props)
    return made


def _named(node: ir.Node, name: str, dtype: ir.DataType) -> ir.Value:
    """Return a new node's output with a name of its own; the node is called alike."""
    (value,) = node.outputs
    value.name, value.type = name, ir.TensorType(dtype)
    node.name = node.name or f"{name}/{node.op_type}"
    return value


def _short(dtype: ir.DataType) -> str:
    return {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16"}.get(dtype, "bfloat16")


def _layer(node: ir.Node) -> str:
    return node.metadata_props.get("normfuse.layer") or node.name or node.op_type
