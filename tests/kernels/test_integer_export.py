"""A network of integer operators through torch.onnx.export: a checked file that stock onnxruntime runs bit for bit."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_calls import IR_VERSION, OPSET, assert_identical, session_of
from torch import Tensor, nn

from normfuse.export.integer_translation import add_functions, integer_translations
from normfuse.kernels.onnx_functions import DOMAIN, VERSION
from normfuse.testing import Small, seeded

CHANNELS, TOKENS, CLASSES = 12, 30, 7
OPS: Final = torch.ops.normfuse
RELU: Final = {"zero_point": -9, "minimum": -9, "maximum": 127}
CODES: Final = {"zero_point": 0, "minimum": -128, "maximum": 127}
SUM: Final = (2**20, -(2**19), 77, 20, *CODES.values())
WIDE: Final = {"zero_point": 0, "minimum": -32768, "maximum": 32767}

CALLED: Final = {
    "int_conv2d": 1,
    "int_conv2d_add": 1,
    "requantize": 1,
    "int_layer_norm": 1,
    "int_linear": 2,
    "int_attention": 1,
    "int_attention_bias": 1,
    "int_matmul": 1,
    "int_multiply": 1,
    "int_linear_add": 1,
    "int_rms_norm": 1,
    "int_linear_table": 1,
    "int_table": 1,
    "int_add": 1,
    "int_mean": 1,
}
"""The nodes of the network below."""


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=seeded(seed), dtype=torch.int8)


def integers(*shape: int, limit: int) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=seeded(limit), dtype=torch.int32)


class Network(nn.Module):
    """An image to classes through every integer operator, each with scales that spread its codes."""

    def __init__(self) -> None:
        super().__init__()
        c, head = CHANNELS, CLASSES
        buffers = {"conv": weights(c, 3, 3, 2), "depthwise": weights(c, 1, 3, 3), "table": weights(256)}
        buffers |= {name: weights(c, c, seed=seed) for seed, name in enumerate(("up", "down", "gate"))}
        buffers |= {"bias": integers(c, limit=3000), "offset": integers(c, limit=20), "ratio": integers(c, limit=2**20)}
        buffers |= {"head": weights(head, c), "few": integers(head, limit=99), "ratios": integers(head, limit=2**21)}
        mask = torch.rand(TOKENS, TOKENS, generator=seeded(3)) < 0.3
        buffers["mask"] = torch.where(mask, -(2**30), integers(TOKENS, TOKENS, limit=500)).to(torch.int32)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        b: Any = self
        op = OPS
        x = op.int_conv2d(image, b.conv, b.bias, b.ratio, [2, 1], [1, 2], [1, 2], 1, 5, 27, **RELU)
        y = op.int_conv2d_add(
            x, b.depthwise, b.bias, b.ratio, x, [1, 1], [1, 1], [1, 1], CHANNELS, -9, 2**25, 27, **CODES
        )
        wide = op.requantize(y.flatten(2).transpose(1, 2), b.offset, b.ratio, 12, **WIDE)
        normal = op.int_layer_norm(wide, b.bias * 64, b.ratio, 17, 34, **CODES)
        heads = normal.reshape(-1, TOKENS, 3, CHANNELS // 3).permute(0, 2, 1, 3)
        scores = {"score_multiplier": 2**20, "score_shift": 24, "multiplier": 2**30, "shift": 50}
        plain = op.int_attention(heads, heads.transpose(-1, -2), heads, None, **scores, **CODES)
        masked = op.int_attention(heads, heads.transpose(-1, -2), heads, b.mask, **scores, **CODES)
        mixed = op.int_matmul(plain, masked.transpose(-1, -2), 2**20, 26, **CODES)
        both = op.int_multiply(plain, masked, 3, -4, 2**20, 26, **CODES)
        tokens = both.permute(0, 2, 1, 3).reshape(-1, TOKENS, CHANNELS)
        added = op.int_linear_add(tokens, b.down, b.bias, b.ratio, wide, 2**16, 24, **WIDE)
        small = op.int_rms_norm(added, b.bias, b.ratio, 17, 34, **CODES)
        gated = op.int_linear_table(small, b.up, b.bias, b.ratio, b.table, 27, 3)
        looked_up = op.int_table(op.int_linear(small, b.gate, b.bias, b.ratio, 27, **CODES), b.table)
        found = op.int_add(gated, looked_up, *SUM)
        mean = op.int_mean(found, [1], False, 40, 2**20, 24, **CODES)
        return op.int_linear(mean, b.head, b.few, b.ratios, 26, **WIDE), mixed


def exported(network: nn.Module, x: Tensor) -> ir.Model:
    """Return the file's content, made as ``normfuse.export.onnx`` makes it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.export.export(network.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecation warnings
        found: Any = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, custom_translation_table=integer_translations(), verbose=False
        )
    model: ir.Model = found.model
    add_functions(model)
    model.ir_version = IR_VERSION
    return model


def images(batch: int) -> Tensor:
    return torch.randint(-128, 128, (batch, 3, 9, 4), generator=seeded(batch), dtype=torch.int8)


@pytest.fixture(scope="module")
def network_file() -> onnx.ModelProto:
    return ir.serde.serialize_model(exported(Network(), images(3)))


def reached(model: onnx.ModelProto) -> set[str]:
    """Return the functions that the graph calls, and those that they call."""
    bodies = {function.name: function for function in model.functions}
    found, wanted = set[str](), [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    while wanted:
        if (name := wanted.pop()) not in found:
            found.add(name)
            wanted += [node.op_type for node in bodies[name].node if node.domain == DOMAIN]
    return found


def test_file_is_checked(network_file: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    onnx.save(network_file, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert network_file.ir_version == 10
    assert {each.domain: each.version for each in network_file.opset_import} == {"": 21, DOMAIN: VERSION}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 33])
def test_engine_equals_reference(network_file: onnx.ModelProto, batch: int, threads: int) -> None:
    session, x = session_of(network_file, threads=threads), images(batch)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for each, expected in zip(found, Network()(x), strict=True):
        assert_identical(torch.from_numpy(each), expected)


def test_network_spreads_its_codes() -> None:
    """Scales that leave nothing, or cut everything, would hide what is wrong before them."""
    for each in Network()(images(33)):
        assert len(each.unique()) > 100


def test_every_item_is_itself_in_every_batch(network_file: onnx.ModelProto) -> None:
    session, x = session_of(network_file), images(7)
    (name,) = [each.name for each in session.get_inputs()]
    together: Any = session.run(None, {name: x.numpy()})
    for index in range(7):
        alone: Any = session.run(None, {name: x[index : index + 1].numpy()})
        for one, every in zip(alone, together, strict=True):
            assert_identical(torch.from_numpy(one[0]), torch.from_numpy(every[index]))


def test_nodes_are_the_operators(network_file: onnx.ModelProto) -> None:
    assert Counter(node.op_type for node in network_file.graph.node if node.domain == DOMAIN) == CALLED
    others = {node.op_type for node in network_file.graph.node if node.domain != DOMAIN}
    assert others <= {"Reshape", "Transpose", "Shape", "Concat", "Gather", "Constant"}


def assert_functions_are_those_called(model: onnx.ModelProto) -> None:
    names = [function.name for function in model.functions]
    assert len(names) == len(set(names))
    assert {function.domain for function in model.functions} <= {DOMAIN}
    assert set(names) == reached(model)


def test_functions_are_those_called(network_file: onnx.ModelProto) -> None:
    assert_functions_are_those_called(network_file)
    assert {function.name for function in network_file.functions} > set(CALLED) | {"rescale", "saturate"}


def test_weights_stay_codes(network_file: onnx.ModelProto) -> None:
    types = Counter(each.data_type for each in network_file.graph.initializer if len(each.dims) > 1)
    assert types == {onnx.TensorProto.INT8: 6, onnx.TensorProto.INT32: 1}


BY_NAME: Final = {"maximum": 127, "shift": 25, "minimum": -9, "zero_point": -9}
SINGLE: Final = {
    "int_table": lambda m, x: OPS.int_table(x, m.table),
    "int_mean": lambda m, x: OPS.int_mean(x, [2, 3], True, 0, 9, 6, **WIDE),
    "requantize": lambda m, x: OPS.requantize(x, m.bias[:1], m.ratio[:1], 25, **WIDE),
    "int_matmul": lambda m, x: OPS.int_matmul(x, x.transpose(-1, -2), 9, 9, **CODES),
    "int_linear": lambda m, x: OPS.int_linear(multiplier=m.ratio, bias=m.bias, weight=m.weight, x=x, **BY_NAME),
}
"""One node each; the last is called by names, in another order."""


@pytest.mark.parametrize("name", SINGLE)
def test_one_operator_and_nothing_else_is_in_the_file(name: str, tmp_path: Path) -> None:
    vectors = {"bias": integers(5, limit=99), "ratio": integers(5, limit=2**20)}
    model = Small(SINGLE[name], table=weights(256), weight=weights(5, 4), **vectors)
    written = ir.serde.serialize_model(exported(model, images(2)))
    assert {node.op_type for node in written.graph.node if node.domain == DOMAIN} == {name}
    assert_functions_are_those_called(written)
    onnx.save(written, tmp_path / "one.onnx")
    onnx.checker.check_model(str(tmp_path / "one.onnx"), full_check=True)
    session = session_of(written)
    (found,) = session.run(None, {session.get_inputs()[0].name: images(5).numpy()})
    assert_identical(torch.from_numpy(found), model(images(5)))


def test_without_operators_nothing_is_added() -> None:
    written = ir.serde.serialize_model(exported(Small(lambda m, x: x.flip(1)), images(2)))
    assert not written.functions
    assert [each.domain for each in written.opset_import] == [""]
