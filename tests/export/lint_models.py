"""For every rule of TensorRT a file that keeps it and one that breaks it; all of one product, or of little more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

__all__ = ["PAIRS", "model"]

INPUTS, OUTPUTS = 256, 64


@dataclass
class Draft:
    """A graph on its way: nodes and constants; ``x`` is its input, the last node's result its output."""

    inputs: tuple[int, ...] = (4, INPUTS)
    kind: int = T.FLOAT
    opset: int = 21
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, values: Any, kind: int = T.FLOAT) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(values)
        if kind in (T.INT4, T.BFLOAT16, T.FLOAT8E4M3FN, T.FLOAT8E5M2, T.FLOAT4E2M1):
            tensor = helper.make_tensor(name, kind, array.shape, array.astype(np.float32).flatten().tolist())
        else:
            tensor = numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(kind)), name)
        self.constants.append(tensor)
        return name

    def call(self, operator: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        names = [f"n{len(self.nodes)}" + f"_{index}" * bool(index) for index in range(outputs)]
        label = f"layer{len(self.nodes)}/{operator}"
        self.nodes.append(helper.make_node(operator, inputs, names, label, domain=domain, **attributes))
        return names[0]

    def codes(self, x: str, scale: Any = 0.05, kind: int = T.INT8, zero: Any = 0, **attributes: Any) -> str:
        """Quantize and dequantize."""
        step = self.constant(np.float32(scale))
        point = self.constant(np.full(np.shape(scale), zero), kind)
        made = self.call("QuantizeLinear", x, step, point, **attributes)
        return self.call("DequantizeLinear", made, step, point, **attributes)

    def weight(self, rows: int = INPUTS, columns: int = OUTPUTS, kind: int = T.INT8, **attributes: Any) -> str:
        """Dequantize random codes, of one scale per column."""
        made = numbers(rows, columns, 7 if kind in (T.INT4, T.FLOAT4E2M1) else 127)
        if block := attributes.get("block_size"):
            steps = np.full((rows // block, columns), 0.01)
            attributes.setdefault("axis", 0)
        else:
            attributes = {"axis": 1, **attributes}
            steps = np.full((rows, columns)[attributes["axis"]], 0.01)
        return self.call("DequantizeLinear", self.constant(made, kind), self.constant(np.float32(steps)), **attributes)


def numbers(rows: int, columns: int, largest: int = 1) -> Any:
    return np.random.default_rng(rows).integers(-largest, largest + 1, (rows, columns))


def model(draft: Draft) -> onnx.ModelProto:
    """Return the file."""
    given = [helper.make_tensor_value_info("x", draft.kind, draft.inputs)]
    last = helper.make_empty_tensor_value_info(draft.nodes[-1].output[0])
    graph = helper.make_graph(draft.nodes, "pair", given, [last], draft.constants)
    domains = {node.domain for node in draft.nodes if node.domain}
    opsets = [helper.make_opsetid("", draft.opset), *(helper.make_opsetid(each, 1) for each in domains)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (output,) = onnx.shape_inference.infer_shapes(made).graph.output
    if not output.type.tensor_type.elem_type:
        output.type.tensor_type.elem_type = draft.kind
    made.graph.output[0].CopyFrom(output)
    return made


def product(draft: Draft, x: str, weight: str) -> Draft:
    draft.call("MatMul", x, weight)
    return draft


def eight_bits(**changes: Any) -> Draft:
    """A product of codes, whose input's are changed."""
    draft = Draft()
    return product(draft, draft.codes("x", **changes), draft.weight())


def floats(draft: Draft, kind: int = T.FLOAT) -> str:
    return draft.constant(numbers(INPUTS, OUTPUTS), kind)


def untold() -> Draft:
    draft = Draft()
    step = draft.constant(np.float32(0.05))
    return product(draft, draft.call("DequantizeLinear", draft.call("QuantizeLinear", "x", step), step), draft.weight())


def by_hand() -> Draft:
    draft = Draft()
    cast = draft.call("Cast", draft.constant(numbers(INPUTS, OUTPUTS, 127), T.INT8), to=T.FLOAT)
    return product(draft, draft.codes("x"), draft.call("Mul", cast, draft.constant(np.float32(0.01))))


def biased(kind: int) -> Draft:
    draft = Draft()
    made = draft.call("MatMul", draft.codes("x"), draft.weight())
    if kind == T.INT32:
        bias = draft.call(
            "DequantizeLinear", draft.constant(np.arange(OUTPUTS), T.INT32), draft.constant(np.float32(1e-3))
        )
    else:
        bias = draft.constant(np.arange(OUTPUTS) * 1e-3)
    draft.call("Add", made, bias)
    return draft


def computed_scale() -> Draft:
    draft = Draft()
    step = draft.call("ReduceMax", draft.call("Abs", "x"), keepdims=0)
    zero = draft.constant(0, T.INT8)
    made = draft.call("DequantizeLinear", draft.call("QuantizeLinear", "x", step, zero), step, zero)
    return product(draft, made, draft.weight())


def weights(reads_codes: bool = True, columns: int = OUTPUTS, rows: int = INPUTS, **options: Any) -> Draft:
    draft = Draft(inputs=(4, rows))
    return product(draft, draft.codes("x") if reads_codes else "x", draft.weight(rows, columns, **options))


def four_bits(**options: Any) -> Draft:
    return weights(reads_codes=False, kind=T.INT4, **options)


def unary(operator: str, domain: str = "") -> Draft:
    draft = Draft()
    draft.call(operator, draft.call("MatMul", "x", floats(draft)), domain=domain)
    return draft


def of_opset(version: int) -> Draft:
    draft = unary("Relu")
    draft.opset = version
    return draft


def typed(kind: int) -> Draft:
    draft = Draft(kind=T.FLOAT16)
    return product(draft, "x", floats(draft, kind))


def attention(kind: int) -> Draft:
    draft = Draft(inputs=(2, 4, 16, 64), kind=kind, opset=23)
    draft.call("Attention", "x", "x", "x")
    return draft


def norm(outputs: int) -> Draft:
    draft = Draft()
    made = draft.call("LayerNormalization", "x", draft.constant(np.ones(INPUTS)), outputs=outputs)
    draft.call("MatMul", made, floats(draft))
    return draft


def double(kind: int) -> Draft:
    draft = Draft(kind=kind)
    return product(draft, "x", floats(draft, kind))


def scores(scaled_first: bool) -> Draft:
    draft = Draft(inputs=(2, 4, 16, 64))
    keys, scale = draft.call("Transpose", "x", perm=[0, 1, 3, 2]), draft.constant(np.float32(0.125))
    if scaled_first:
        made = draft.call("MatMul", draft.call("Mul", "x", scale), keys)
    else:
        made = draft.call("Mul", draft.call("MatMul", "x", keys), scale)
    draft.call("MatMul", draft.call("Softmax", made, axis=-1), "x")
    return draft


def activated(codes_first: bool) -> Draft:
    draft = Draft()
    made = draft.call("MatMul", draft.codes("x"), draft.weight())
    made = draft.call("Relu", draft.codes(made)) if codes_first else draft.codes(draft.call("Relu", made))
    draft.call("MatMul", made, draft.weight(OUTPUTS, 32))
    return draft


def joined(scales: Sequence[float]) -> Draft:
    draft = Draft()
    parts = [draft.codes(draft.call(name, "x"), scale) for name, scale in zip(("Relu", "Neg"), scales, strict=True)]
    draft.call("MatMul", draft.codes(draft.call("Concat", *parts, axis=1)), draft.weight(2 * INPUTS))
    return draft


def four_bit_activations() -> Draft:
    return eight_bits(kind=T.INT4)


def four_bit_floats() -> Draft:
    draft = weights(reads_codes=False, kind=T.FLOAT4E2M1, block_size=16)
    draft.opset = 23
    return draft


PAIRS: Final[dict[str, tuple[Callable[[], Draft], Callable[[], Draft]]]] = {
    "zero-point": (eight_bits, lambda: eight_bits(zero=3)),
    "code-type": (lambda: biased(T.FLOAT), lambda: biased(T.INT32)),
    "untold-code-type": (eight_bits, untold),
    "unsigned-codes": (eight_bits, lambda: eight_bits(kind=T.UINT8)),
    "codes-by-hand": (eight_bits, by_hand),
    "scale-per-channel": (eight_bits, lambda: eight_bits(scale=np.full(INPUTS, 0.05), axis=1)),
    "scale-along-inputs": (weights, lambda: weights(axis=0)),
    "computed-scale": (eight_bits, computed_scale),
    "int8-blocks": (weights, lambda: weights(block_size=128)),
    "one-sided": (weights, lambda: weights(reads_codes=False)),
    "int4-activations": (eight_bits, four_bit_activations),
    "float4": (lambda: four_bits(block_size=128), four_bit_floats),
    "int4-blocks": (lambda: four_bits(block_size=64), lambda: four_bits(block_size=256)),
    "int4-odd-outputs": (lambda: four_bits(block_size=128), lambda: four_bits(block_size=128, columns=63)),
    "unknown-operator": (lambda: unary("Relu"), lambda: unary("Det")),
    "opset": (lambda: of_opset(25), lambda: of_opset(26)),
    "mixed-types": (lambda: typed(T.FLOAT16), lambda: typed(T.FLOAT)),
    "float32-attention": (lambda: scores(True), lambda: attention(T.FLOAT)),
    "norm-statistics": (lambda: norm(1), lambda: norm(3)),
    "float64": (lambda: double(T.FLOAT), lambda: double(T.DOUBLE)),
    "scaled-scores": (lambda: scores(True), lambda: scores(False)),
    "between": (lambda: activated(False), lambda: activated(True)),
    "concat-scales": (lambda: joined([0.05, 0.05]), lambda: joined([0.05, 0.1])),
}
"""By the name of a rule: what keeps it, and what breaks it."""
