"""Rules about operators: which TensorRT knows, in which types, and in which order it fuses them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from normfuse.export.lint.reading import FLOATS, STANDARD, constant, input_of, maker, nodes
from normfuse.export.lint.rule import Level, LintRule, Site

__all__ = ["OPERATOR_RULES"]

LARGEST_OPSET: Final = 25

TYPED_ALIKE: Final = ("MatMul", "Gemm", "Conv", "Add", "Sub", "Mul", "Div", "Where", "Concat")

ACTIVATIONS: Final = frozenset({"Relu", "Clip", "LeakyRelu"})

UNKNOWN: Final = frozenset(
    {
        *("AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
        *("CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd", "Det"),
        *("DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix"),
        *("Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement"),
        *("QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty"),
        *("SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss"),
        *("SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique"),
    }
)
"""Standard operators that neither TensorRT nor TensorRT-RTX knows. DFT and DeformConv are left out: of full TensorRT
there are plugins."""


def _unknown(model: ir.Model) -> Iterator[Site]:
    for node in model.graph.all_nodes():
        if node.domain in STANDARD:
            if node.op_type in UNKNOWN:
                yield Site(node, node.op_type)
        elif (function := model.functions.get(node.op_identifier())) is None:
            yield Site(node, f"{node.domain}.{node.op_type}")
        elif names := sorted(_unknown_inside(model, function, set())):
            yield Site(node, f"{node.domain}.{node.op_type}, whose body has {', '.join(names)}")


def _unknown_inside(model: ir.Model, function: ir.Function, seen: set[ir.OperatorIdentifier]) -> set[str]:
    seen.add(function.identifier())
    found = set[str]()
    for node in function.all_nodes():
        inner = model.functions.get(node.op_identifier())
        if inner is None and (node.domain not in STANDARD or node.op_type in UNKNOWN):
            found.add(node.op_type)
        elif inner is not None and inner.identifier() not in seen:
            found |= _unknown_inside(model, inner, seen)
    return found


def _opset(model: ir.Model) -> Iterator[Site]:
    version = model.opset_imports.get("", 0)
    if version > LARGEST_OPSET:
        yield Site("opset", str(version))


def _mixed_types(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, *TYPED_ALIKE):
        kinds = {each.dtype for each in node.inputs if each is not None and each.dtype in FLOATS}
        if len(kinds) > 1:
            yield Site(node, " and ".join(sorted(str(kind).lower() for kind in kinds)))


def _attention(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "Attention"):
        q = node.inputs[0]
        if q is not None and q.dtype is ir.DataType.FLOAT:
            yield Site(node)


def _statistics(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "LayerNormalization"):
        if len(node.outputs) > 1:
            yield Site(node, f"{len(node.outputs)} outputs")


def _doubles(model: ir.Model) -> Iterator[Site]:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype is ir.DataType.DOUBLE:
            yield Site(name)


def _scaled_scores(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "Softmax"):
        made = maker(node.inputs[0])
        if made is not None and made.op_type in ("Add", "Where"):  # a bias or a mask
            made = next((each for each in map(maker, made.inputs) if each is not None), None)
        if made is None or made.op_type not in ("Mul", "Div"):
            continue
        sources = [maker(each) for each in made.inputs]
        has_product = any(each is not None and each.op_type == "MatMul" for each in sources)
        if has_product and any(constant(each) is not None for each in made.inputs):
            yield Site(made)


def _between(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "DequantizeLinear"):
        quantizer = maker(node.inputs[0])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            continue
        product = maker(quantizer.inputs[0])
        readers = [reader for output in node.outputs for reader in output.consumers()]
        is_activated = bool(readers) and all(reader.op_type in ACTIVATIONS for reader in readers)
        if is_activated and product is not None and product.op_type in ("MatMul", "Gemm", "Conv"):
            yield Site(quantizer, f"in front of {readers[0].op_type}")


def _joined_scales(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "Concat"):
        made = [maker(each) for each in node.inputs]
        if len(made) < 2 or any(each is None or each.op_type != "DequantizeLinear" for each in made):
            continue
        found = [constant(input_of(each, 1)) for each in made if each is not None]
        different = {each.numpy().tobytes() for each in found if each is not None}
        if len(different) > 1:
            yield Site(node, f"{len(different)} scales")


OPERATOR_RULES: Final = (
    LintRule(
        name="unknown-operator",
        level=Level.ERROR,
        says="TensorRT does not know the operator",
        mend="use standard operators that it knows, or give it a plugin",
        find=_unknown,
    ),
    LintRule(
        name="opset",
        level=Level.ERROR,
        says=f"the opset is above {LARGEST_OPSET}",
        mend="export with opset 21",
        find=_opset,
    ),
    LintRule(
        name="mixed-types",
        level=Level.ERROR,
        says="floats of two types meet, and a strongly typed network does not convert them",
        mend="cast one of them",
        find=_mixed_types,
    ),
    LintRule(
        name="float32-attention",
        level=Level.ERROR,
        says="the operator Attention has no kernel for float32",
        mend="write it as MatMul and Softmax, or compute it in float16",
        find=_attention,
    ),
    LintRule(
        name="norm-statistics",
        level=Level.ERROR,
        says="a LayerNormalization has more than one output",
        mend="keep the first alone",
        find=_statistics,
    ),
    LintRule(
        name="float64",
        level=Level.WARNING,
        says="a constant is float64, and is narrowed without a word",
        mend="export in float32",
        find=_doubles,
    ),
    LintRule(
        name="scaled-scores",
        level=Level.WARNING,
        says="scores of attention are scaled behind their product, which can keep attention from being fused",
        mend="scale the queries instead",
        find=_scaled_scores,
    ),
    LintRule(
        name="between",
        level=Level.WARNING,
        says="codes stand between a product and its activation, so the two are not fused",
        mend="quantize behind the activation",
        find=_between,
    ),
    LintRule(
        name="concat-scales",
        level=Level.WARNING,
        says="tensors of different scales are joined, so they are rescaled first",
        mend="give all of them one scale",
        find=_joined_scales,
    ),
)
