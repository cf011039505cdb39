"""How constant codes stand in the file: two to a byte, or to be unpacked once, when it is loaded."""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

__all__ = ["is_packed", "pack_grouped_codes", "pack_small_codes", "unpacked_at_loading"]

FEWEST: Final = 64
"""Constants of fewer elements save less than the node in front of them costs."""

SMALLEST, LARGEST, ZERO = -8, 7, 8


def is_packed(codes: Tensor) -> bool:
    """Return whether the file holds this constant with four bits per element."""
    is_large = codes.dtype is torch.int8 and codes.numel() >= FEWEST
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
    """Lay out the codes of MatMulNBits as it wants them: uint8 [out, groups, size / 2], low nibble first, zero at 8."""
    for node in list(model.graph):
        if node.op_type == "MatMulNBits":
            codes, size = node.inputs[1], node.attributes["block_size"].as_int()
            assert codes is not None
            assert codes.name is not None
            assert codes.const_value is not None
            raw = codes.const_value.numpy().astype(np.int16) + ZERO
            packed = (raw[:, 0::2] | raw[:, 1::2] << 4).astype(np.uint8).reshape(len(raw), -1, size // 2)
            name = f"{codes.name}_packed"
            value = ir.Value(
                name=name,
                shape=ir.Shape(packed.shape),
                type=ir.TensorType(ir.DataType.UINT8),
                const_value=ir.tensor(packed, name=name),
            )
            node.replace_input_with(1, value)
            model.graph.register_initializer(value)
            if not codes.uses():
                del model.graph.initializers[codes.name]


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
