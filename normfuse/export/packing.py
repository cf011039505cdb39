"""How constant codes stand in the file: two to a byte, or to be unpacked once, when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

__all__ = ["is_packed", "pack_grouped_codes", "pack_small_codes", "unpacked_at_loading"]

FEWEST: Final = 64
"""Constants of fewer elements save less than the node in front of them costs."""

SMALLEST, LARGEST = -8, 7
FOUR, EIGHT = 4, 8

Codes = np.ndarray[Any, np.dtype[Any]]


def is_packed(codes: Tensor) -> bool:
    """Return whether the file holds this constant with four bits per element: codes, not the zero points of rows."""
    is_large = codes.dtype is torch.int8 and codes.numel() >= FEWEST and codes.ndim > 1
    return is_large and int(codes.min()) >= SMALLEST and int(codes.max()) <= LARGEST


def pack_small_codes(model: ir.Model) -> None:
    """Hold int8 constants whose values fit int4 as int4, with a cast in front of who reads them.

    Two values share a byte. onnxruntime computes the cast once, when it loads the file, so its integer kernels run as
    they do for 8 bits (DequantizeLinear of int4 has none).
    """
    for value in list(model.graph.initializers.values()):
        if (codes := _small_codes(value)) is not None:
            _pack(model.graph, value, codes)


def pack_grouped_codes(model: ir.Model) -> None:
    """Lay out codes and zero points of onnxruntime's operators on groups as these want them.

    GatherBlockQuantized takes int4. Of MatMulNBits both are unsigned, in four bits where they fit, else eight: codes
    become uint8 [out, groups, bytes of a group] and zero points, if there are any, [out, bytes of the groups];
    of two values in a byte the low nibble is the first. Without zero points zero stands at the middle code.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "GatherBlockQuantized":
            _replace(graph, node, 0, ir.DataType.INT4, "int4", lambda codes: codes.astype(ml_dtypes.int4))
        if node.op_type == "MatMulNBits":
            held = [value for value in (*node.inputs[1:2], *node.inputs[3:4]) if value is not None]
            bits = FOUR if all(_fits(_constant(value)) for value in held) else EIGHT
            node.attributes["bits"] = ir.AttrInt64("bits", bits)
            size = node.attributes["block_size"].as_int() * bits // EIGHT
            layout = f"{bits}_bits"
            rows = partial(_rows, bits=bits, size=size)
            _replace(graph, node, 1, ir.DataType.UINT8, f"{layout}_of_{size}", rows)
            if held[1:]:
                _replace(graph, node, 3, ir.DataType.UINT8, layout, partial(_unsigned, bits=bits))


def _constant(value: ir.Value) -> Codes:
    assert value.const_value is not None
    return value.const_value.numpy()


def _fits(codes: Codes) -> bool:
    return int(codes.min()) >= SMALLEST and int(codes.max()) <= LARGEST


def _rows(codes: Codes, bits: int, size: int) -> Codes:
    """Return codes as MatMulNBits takes them, [rows, groups, bytes of a group]."""
    return _unsigned(codes, bits).reshape(len(codes), -1, size)


def _unsigned(codes: Codes, bits: int) -> Codes:
    """Return signed codes, [rows, columns], with zero at the middle, two to a byte where they have four bits."""
    raw = codes.astype(np.int16) + (1 << (bits - 1))
    if bits == FOUR:
        raw = np.pad(raw, ((0, 0), (0, raw.shape[1] % 2)))
        raw = raw[:, 0::2] | raw[:, 1::2] << FOUR
    return raw.astype(np.uint8)


def _replace(
    graph: ir.Graph, node: ir.Node, index: int, dtype: ir.DataType, layout: str, pack: Callable[[Codes], Codes]
) -> None:
    """Let an input of a node be a packed constant, named after the one before and its layout.

    What several nodes read in one layout is packed once; what nobody reads any more goes.
    """
    before = node.inputs[index]
    assert before is not None
    assert before.name is not None
    name = f"{before.name}_{layout}"
    if name not in graph.initializers:
        packed = pack(_constant(before))
        const = ir.tensor(packed, dtype=dtype, name=name)
        shape, type_ = ir.Shape(packed.shape), ir.TensorType(dtype)
        graph.register_initializer(ir.Value(name=name, shape=shape, type=type_, const_value=const))
    node.replace_input_with(index, graph.initializers[name])
    if not before.uses():
        del graph.initializers[before.name]


def _small_codes(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]] | None:
    if value.const_value is None or value.dtype != ir.DataType.INT8 or value.is_graph_output():
        return None
    codes = value.const_value.numpy()
    return codes if is_packed(torch.from_numpy(codes.copy())) else None


def _pack(graph: ir.Graph, value: ir.Value, codes: np.ndarray[tuple[int, ...], np.dtype[np.int8]]) -> None:
    name = value.name
    assert name is not None
    small = ir.Value(
        name=name,
        shape=value.shape,
        type=ir.TensorType(ir.DataType.INT4),
        const_value=ir.tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=name),
    )
    cast = ir.node("Cast", [small], attributes={"to": int(ir.DataType.INT8)}, name=f"{name}/Cast")
    (wide,) = cast.outputs
    wide.name, wide.shape, wide.type = f"{name}_int8", value.shape, value.type
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, wide)
    del graph.initializers[name]
    graph.register_initializer(small)
    graph.insert_before(graph[0], cast)


def unpacked_at_loading(model: ir.Model) -> None:
    """Write weights that meet float activations as a cast and a product.

    onnxruntime computes those of constants once, when it loads the file, but DequantizeLinear in every run.
    """
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 2:
            _unpack(model.graph, node)


def _unpack(graph: ir.Graph, node: ir.Node) -> None:
    codes, scale = node.inputs
    assert codes is not None
    assert scale is not None
    assert scale.const_value is not None
    assert codes.shape is not None
    spread = scale.const_value.numpy().reshape(-1, *[1] * (len(codes.shape) - 1))
    wide = ir.Value(
        name=f"{scale.name}_spread",
        shape=ir.Shape(spread.shape),
        type=scale.type,
        const_value=ir.tensor(spread, name=f"{scale.name}_spread"),
    )
    graph.register_initializer(wide)
    cast = ir.node("Cast", [codes], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{codes.name}/Unpack")
    product = ir.node("Mul", [cast.outputs[0], wide], name=f"{codes.name}/Scale")
    cast.outputs[0].name = f"{codes.name}_float"
    (result,), (old,) = product.outputs, node.outputs
    result.name, result.shape, result.type = old.name, old.shape, old.type
    graph.insert_before(node, [cast, product])
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, result)
    graph.remove(node, safe=True)
    if not scale.uses():
        del graph.initializers[scale.name]  # type: ignore[arg-type]
