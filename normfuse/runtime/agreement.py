"""Does the engine do what the simulation says? Compared code by code, segment by segment, product by product."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from normfuse.graph import Graph
from normfuse.kernels.ops import GROUPED_LINEAR, QUANTIZE, QUANTIZE_FLOAT8
from normfuse.quant.dynamic_rows import ROUNDED_LEVEL
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.integer_type import INT8_NARROW
from normfuse.runtime.onnx_session import open_onnx

__all__ = ["Agreement", "ProductAgreement", "TensorAgreement", "compare_codes", "output_error"]

QUANTIZERS: Final = (QUANTIZE, QUANTIZE_FLOAT8)

FARTHEST: Final = 2 * 0x7E
"""How many 8-bit floats there are from the smallest to the largest, counted as differences."""

SHOWN: Final = "_shown"
"""Behind the name of 8-bit floats: the same as floats."""


@dataclass(frozen=True, slots=True)
class TensorAgreement:
    """How far one quantized tensor's codes in the engine are from the simulation's."""

    name: str
    largest_difference: int
    share_different: float


@dataclass(frozen=True, slots=True)
class ProductAgreement:
    """How far one product that makes the codes of its input is from the simulation's, both given the engine's input.

    ``error`` is the largest difference, relative to the output's scale; the codes themselves are nowhere in the
    engine's file. ``input_error`` is that of the input, which the simulation makes of what the engine's products and
    quantizers in front gave it; 0 where another product writes it.
    """

    name: str
    error: float
    input_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """All quantized tensors and products that make codes; the largest output difference relative to the output's scale.

    ``missing`` are quantizers of the graph whose codes the engine does not show: about them nothing is known.
    ``output_error`` is infinite where there was nothing to compare. Where there are products it is that of a copy of
    the file that shows what they read and write; ``shipped_error`` is always that of the file itself.
    """

    tensors: tuple[TensorAgreement, ...]
    output_error: float
    shipped_error: float
    missing: tuple[str, ...] = ()
    products: tuple[ProductAgreement, ...] = ()

    @property
    def largest_product_error(self) -> float:
        """The largest error of any product that makes the codes of its input."""
        return max((product.error for product in self.products), default=0.0)

    @property
    def largest_input_error(self) -> float:
        """The largest error of any such product's input."""
        return max((product.input_error for product in self.products), default=0.0)

    @property
    def largest_difference(self) -> int:
        """The largest difference of any code."""
        return max((tensor.largest_difference for tensor in self.tensors), default=0)


def compare_codes(
    graph: Graph,
    path: Path,
    samples: Iterable[Sequence[Tensor]],
    *,
    threads: int = 1,
    session_config: Mapping[str, str] | None = None,
) -> Agreement:
    """Run engine and simulation on the same samples; compare every quantizer's codes, every dynamic product (ours).

    Behind each quantizer the simulation goes on with the engine's codes, so that each segment is judged alone:
    a code that differs by one early in the network is not counted again in everything behind it. A product that makes
    codes of what it reads is given the engine's input, compared first, and behind it the engine's output goes on.

    The codes of products have no name, so there another run cannot be followed code by code: the file that ships and
    its copy that shows more may round some floats otherwise, which moves codes at a border. Both are run and compared.

    Args:
        graph: the quantized graph that ``path`` was exported from.
        path: the ONNX file.
        samples: one tensor per input each, batch axis first.
        threads: onnxruntime's threads.
        session_config: the session entries that the artifact is run with.
    """
    config = session_config or {}
    seen, errors, shipped = _Seen(), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        opened = Path(folder) / "opened.onnx"
        products = _Product.paired(graph, _show(path, opened))
        engine = open_onnx(path, threads=threads, session_config=config)
        witness = open_onnx(opened, threads=threads, session_config=config)
        for sample in samples:
            feeds = {name: value.numpy() for name, value in zip(graph.input_names, sample, strict=True)}
            shown, outputs = witness.run(feeds), engine.run(feeds)
            simulated = graph.run_watched(sample, _Forcing({**feeds, **shown}, products, seen))
            for name, value in zip(graph.output_names, simulated, strict=True):
                shipped.append(output_error(outputs[name], value.numpy()))
                errors.append(output_error(shown[name], value.numpy()) if products else shipped[-1])
    missing = tuple(node.name for node in graph.nodes if node.target in QUANTIZERS and node.name not in seen.codes)
    return Agreement(
        tensors=seen.tensors,
        output_error=max(errors, default=math.inf),
        shipped_error=max(shipped, default=math.inf),
        missing=missing,
        products=tuple(seen.agreement(product) for product in products if product.node.name in seen.products),
    )


def output_error(found: Any, expected: Any) -> float:
    """Return the largest absolute difference relative to the largest finite magnitude expected.

    Infinite where nothing can be told or nothing agrees: another shape, a NaN on either side (it would vanish in any
    maximum), an infinity on one side only. The same infinity on both sides is no difference.
    """
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    finite = np.isfinite(expected)
    if found.shape != expected.shape or not np.array_equal(found[~finite], expected[~finite]):
        return math.inf
    scale = float(np.max(np.abs(expected[finite]), initial=0.0)) or 1.0
    error = float(np.max(np.abs(found[finite] - expected[finite]), initial=0.0)) / scale
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True, slots=True)
class _Product:
    """A product that makes codes of what it reads, and the names of its input and output in the engine."""

    node: fx.Node
    read: str
    written: str

    @classmethod
    def paired(cls, graph: Graph, shown: Sequence[tuple[str, str]]) -> list[_Product]:
        """Return the graph's; they stand in the file in the graph's order."""
        nodes = [node for node in graph.nodes if node.target is GROUPED_LINEAR and node.args[-1]]
        return [cls(node, *names) for node, names in zip(nodes, shown, strict=True)]

    @property
    def source(self) -> fx.Node:
        """The node that makes what it reads."""
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return source


class _Seen:
    """The differences of all samples so far.

    Attributes:
        codes: by quantizer, the largest difference, how many codes differ, how many there are.
        products: the largest error by product.
        inputs: the largest error by node that a product reads.
    """

    def __init__(self) -> None:
        self.codes = dict[str, list[int]]()
        self.products, self.inputs = dict[str, float](), dict[str, float]()

    @property
    def tensors(self) -> tuple[TensorAgreement, ...]:
        return tuple(TensorAgreement(name, far, bad / max(all_, 1)) for name, (far, bad, all_) in self.codes.items())

    def agreement(self, product: _Product) -> ProductAgreement:
        name = product.node.name
        return ProductAgreement(name, self.products[name], self.inputs.get(product.source.name, 0.0))

    def add_codes(self, name: str, difference: Tensor) -> None:
        total = self.codes.setdefault(name, [0, 0, 0])
        total[0] = max(total[0], int(difference.max()))
        total[1] += int((difference > 0).sum())
        total[2] += difference.numel()


class _Forcing:
    """Compares the codes of each quantizer, and what each dynamic product reads and writes; the engine's goes on."""

    def __init__(self, engine: Mapping[str, Any], products: Sequence[_Product], seen: _Seen) -> None:
        self._engine, self._seen = engine, seen
        self._written = {product.node: product.written for product in products}
        self._read = {product.source: product.read for product in products}

    def __call__(self, node: fx.Node, value: Any) -> Any:
        if (written := self._written.get(node)) is not None:
            return self._floats(self._seen.products, node.name, self._engine[written], value)
        if (read := self._read.get(node)) is not None:
            return self._floats(self._seen.inputs, node.name, self._engine[read].reshape(value.shape), value)
        if node.target is QUANTIZE_FLOAT8 and (shown := self._engine.get(f"{node.name}{SHOWN}")) is not None:
            floats = torch.from_numpy(shown).to(FLOAT8.torch_dtype)
            self._seen.add_codes(node.name, _steps_between(floats, value))
            return floats
        if node.target is not QUANTIZE or node.name not in self._engine:
            return value
        codes = torch.from_numpy(self._engine[node.name])
        self._seen.add_codes(node.name, (codes.int() - value.int()).abs())
        return codes

    @staticmethod
    def _floats(worst: dict[str, float], name: str, found: Any, value: Tensor) -> Tensor:
        worst[name] = max(worst.get(name, 0.0), output_error(found, value.numpy()))
        return torch.from_numpy(found)


def _steps_between(found: Tensor, expected: Tensor) -> Tensor:
    """Return how many codes 8-bit floats are apart; near zero, where codes are dense, in steps of an int8 (ours).

    What rounds sums of large numbers moves small results by many of their own steps, and nothing by that. Where only
    one of the two is a number they are as far apart as any.
    """
    codes = (_order(found) - _order(expected)).abs()
    steps = (found.float() - expected.float()).abs() * (INT8_NARROW.maximum / FLOAT8.maximum)
    near = torch.minimum(codes, steps.nan_to_num().ceil().int())
    return torch.where(found.isnan() == expected.isnan(), near, FARTHEST)


def _order(floats: Tensor) -> Tensor:
    """Return how many 8-bit floats lie between zero and each of these, with its sign."""
    bits = floats.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def _show(path: Path, opened: Path) -> list[tuple[str, str]]:
    """Write a copy of the model that also returns what every QuantizeLinear makes, behind the Clip of narrow types.

    It returns inputs and outputs of products that make codes, too; their names are returned, in the file's order.
    """
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    returned = {value.name for value in model.graph.output}
    narrowed = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Clip"}
    for node in list(model.graph.node):
        if node.op_type != "QuantizeLinear":
            continue
        kind = kinds.get(node.input[2], onnx.TensorProto.UINT8)
        name = narrowed.get(node.output[0], node.output[0])
        if kind == onnx.TensorProto.FLOAT8E4M3FN:  # numpy has no such arrays
            model.graph.node.append(
                onnx.helper.make_node("Cast", [name], [f"{name}{SHOWN}"], to=onnx.TensorProto.FLOAT)
            )
            name, kind = f"{name}{SHOWN}", onnx.TensorProto.FLOAT
        if name not in returned:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    products = [(node.input[0], node.output[0]) for node in model.graph.node if _makes_codes(node)]
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    for name in dict.fromkeys(name for names in products for name in names):
        if name not in known:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    # Protobuf ends at 2 GiB, which a model with its constants in a file beside it may exceed.
    onnx.save(model, opened, save_as_external_data=True, location=f"{opened.name}.data")
    return products


def _makes_codes(node: onnx.NodeProto) -> bool:
    level = next((each.i for each in node.attribute if each.name == "accuracy_level"), 0)
    return node.op_type == "MatMulNBits" and level == ROUNDED_LEVEL
