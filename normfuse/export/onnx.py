"""From a ``Graph`` to a checked ONNX file in which every node carries the user's layer name."""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from normfuse.errors import UnsupportedModel
from normfuse.export.integer_translation import add_functions, integer_translations
from normfuse.export.packing import pack_grouped_codes, pack_small_codes, unpacked_at_loading
from normfuse.export.quantizer_translation import translation_table
from normfuse.export.saving import save_checked
from normfuse.export.standard_translation import pack_blocks, standard_translations
from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import editing
from normfuse.graph.program import to_program
from normfuse.kernels.ops import QUANTIZE, QUANTIZE_FLOAT8, RESHAPE

__all__ = ["OPSET", "export_onnx"]

OPSET: Final = 21
"""The newest opset that onnxruntime 1.20 runs; it has Gelu and blocked DequantizeLinear."""

IR_VERSION: Final = 10
"""The newest file version that onnxruntime 1.20 reads."""

LAYER: Final = "normfuse.layer"


def _product(rows: Any, weight: Any) -> Any:
    return op.Gemm(rows, weight)


def _product_and_bias(bias: Any, rows: Any, weight: Any) -> Any:
    return op.Gemm(rows, weight, bias)


def _reshape(x: Any, shape: Sequence[Any]) -> Any:
    whole: Any = op.Constant(value_ints=list(shape)) if all(isinstance(size, int) for size in shape) else _joined(shape)
    return op.Reshape(x, whole)


def _joined(shape: Sequence[Any]) -> Any:
    alone: Any = op.Constant(value_ints=[-1])
    sizes: list[Any] = [op.Constant(value_ints=[n]) if isinstance(n, int) else op.Reshape(n, alone) for n in shape]
    return op.Concat(*sizes, axis=0)


TRANSLATIONS: Final[dict[Any, Any]] = {
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.addmm.default: _product_and_bias,
    RESHAPE: _reshape,
}
"""Products of rows become Gemm, with or without bias: onnxruntime's integer Gemm takes both in, MatMul + Add not.

A reshape stays one, which `_translate` has made of every one of them: the exporter takes torch's apart into views,
and traces again with other strides, where those views do not exist.
"""


def export_onnx(graph: Graph, path: Path, *, standard: bool = False) -> None:
    """Write the graph as ONNX (opset 21), with dynamic batch, input and output names kept.

    With ``standard`` it has the operators of the ONNX standard alone, as builders want it; else products of floats and
    codes are those of onnxruntime, and codes of few bits are packed as it gains from.

    The outputs of QuantizeLinear are named like the graph's quantize nodes, so that the simulation and the
    engine can be compared code by code.

    Raises:
        UnsupportedModel: the exporter has no translation for an operator; the message names it.
    """
    with _quiet():
        model = _translate(graph, standard=standard)
    _name_interface(model, graph)
    _name_quantizers(model, graph)
    _name_nodes(model)
    _drop_defaults(model)
    if standard:
        pack_blocks(model)
    else:
        _suit_onnxruntime(model)
    _forget_types(model)
    model.ir_version = IR_VERSION
    model.producer_name = "normfuse"
    save_checked(model, path)


def _suit_onnxruntime(model: ir.Model) -> None:
    unpacked_at_loading(model)
    pack_grouped_codes(model)
    pack_small_codes(model)
    add_functions(model)
    _keep_float_weights(model)


def _forget_types(model: ir.Model) -> None:
    """Let constants be told by their tensors alone; of each the file would hold type and shape once more."""
    for value in model.graph.initializers.values():
        value.type = value.shape = None


def _keep_float_weights(model: ir.Model) -> None:
    """Keep onnxruntime from quantizing weights that are float here.

    Of a float product between DequantizeLinear and QuantizeLinear it makes one of 8-bit weights (its
    WeightBiasQuantization, onnxruntime 1.31.1, which the default options run). A maximum of one number stands between
    them then, which it neither removes nor joins.
    """
    for node in list(model.graph):
        product = node.outputs[0]
        is_product = not node.domain and node.op_type in ("Conv", "ConvTranspose", "Gemm")
        if not is_product or not _reads_codes(node) or product.is_graph_output() or not _is_quantized(product):
            continue
        same = ir.Node("", "Max", [product], outputs=[ir.Value(type=product.type, shape=product.shape)])
        same.outputs[0].name = f"{product.name}_kept"
        same.metadata_props.update(node.metadata_props)
        product.replace_all_uses_with(same.outputs[0])
        same.replace_input_with(0, product)
        model.graph.insert_after(node, same)


def _reads_codes(node: ir.Node) -> bool:
    """Return whether a product has codes on its left and a float constant on its right."""
    made = [None if each is None else each.producer() for each in node.inputs[:2]]
    is_float = node.inputs[1] is not None and node.inputs[1].const_value is not None
    return made[0] is not None and made[0].op_type == "DequantizeLinear" and is_float


def _is_quantized(value: ir.Value) -> bool:
    """Return whether codes are made of a value, behind a bound or at once."""
    readers = list(value.consumers())
    bounds = [each for each in readers if each.op_type in ("Relu", "Clip")]
    return any(each.op_type == "QuantizeLinear" for each in readers) or any(
        reader.op_type == "QuantizeLinear" for bound in bounds for reader in bound.outputs[0].consumers()
    )


def _translate(graph: Graph, *, standard: bool) -> ir.Model:
    graph = graph.copy()
    own = standard_translations() if standard else integer_translations()
    with editing(graph) as edit:
        for node in [node for node in graph.nodes if query.is_call(node, ops.RESHAPE)]:
            edit.replace(node, RESHAPE, *node.args)
    try:
        program = torch.onnx.export(
            to_program(graph),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={**translation_table(), **own, **TRANSLATIONS},
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        first = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), str(error))
        raise UnsupportedModel(
            f"the model cannot be written as ONNX: {first}",
            expected="operators that torch.onnx can translate",
            hint="replace the operator in the model; the exporter's own message is chained to this one",
        ) from error
    assert program is not None
    return program.model


def _name_interface(model: ir.Model, graph: Graph) -> None:
    """Give outputs their names, and every size that is not fixed a readable one: equal names are equal sizes."""
    for value, name in zip(model.graph.outputs, graph.output_names, strict=True):
        value.name = name
    names: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                # The first free size at the front of an input is the batch; what differs from it is something else.
                is_batch = axis == 0 and "batch" not in names.values() and value.is_graph_input()
                value.shape[axis] = names.setdefault(size.value, "batch" if is_batch else f"size_{len(names)}")
    _drop_other_symbols(model)


def _drop_other_symbols(model: ir.Model) -> None:
    # Intermediate shapes hold expressions of the tracer's symbols; the runtime infers them again, and types too.
    kept = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if value.name not in kept:
                value.shape = value.type = None


def _name_quantizers(model: ir.Model, graph: Graph) -> None:
    quantizers = [node.name for node in graph.nodes if node.target in (QUANTIZE, QUANTIZE_FLOAT8)]
    emitted = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    for node, name in zip(emitted, quantizers, strict=True):
        codes = _narrowed(node.outputs[0])
        if not codes.is_graph_output():
            codes.name = name


def _narrowed(codes: ir.Value) -> ir.Value:
    """Return the codes behind the Clip that a narrow type needs, or the codes themselves."""
    readers = [use.node for use in codes.uses()]
    return readers[0].outputs[0] if [node.op_type for node in readers] == ["Clip"] else codes


def _name_nodes(model: ir.Model) -> None:
    """Name nodes ``layer/Operator`` and drop the exporter's notes (they hold paths of this machine)."""
    model.graph.metadata_props.clear()
    counts: Counter[str] = Counter()
    for node in model.graph:
        layer = _layer(node)
        stem = f"{layer}/{node.op_type}" if layer else node.op_type
        counts[stem] += 1
        node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        node.metadata_props.clear()
        if layer:
            node.metadata_props[LAYER] = layer
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _drop_defaults(model: ir.Model) -> None:
    """Drop the attributes that say what holds without them; the exporter writes all of them out."""
    for node in model.graph:
        if node.domain:
            continue
        schema = onnx.defs.get_schema(node.op_type, OPSET)
        for name, attribute in list(node.attributes.items()):
            default = schema.attributes[name].default_value
            if default.type == attribute.type.value and onnx.helper.get_attribute_value(default) == attribute.value:
                del node.attributes[name]


def _layer(node: ir.Node) -> str:
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    names = ast.literal_eval(scopes)[:-1] if scopes else []
    return next((name for name in reversed(names) if name and not name.startswith("_empty")), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on packages that are not installed from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
