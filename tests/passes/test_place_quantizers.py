"""Requests stand where the target wants codes, and what stays float is named with its reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normfuse.export.placement import X86_VNNI, tensorrt_placement
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.quantization import is_requested, requests
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.quant import IntegerType
from normfuse.quant.bits import Bits
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.target import EightBits
from normfuse.report import PassReport, Reason
from normfuse.testing import Golden, Small, check_pass_contract, picture, randomized, seeded

PLACE = PlaceQuantizers(placement=X86_VNNI)
HALVES_AND_DOUBLE = [torch.float16, torch.bfloat16, torch.float64]


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9))


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Canonicalize().run(graph)
    return graph


def residual(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    x = (m.conv(x) + x).relu()
    x = (m.last(x) + x).relu()
    result: Tensor = m.head(F.gelu(x.mean(dim=(2, 3))))
    return result


def cnn() -> nn.Module:
    parts = {"stem": nn.Conv2d(2, 8, 3, padding=1), "conv": nn.Conv2d(8, 8, 3, padding=1), "last": nn.Conv2d(8, 8, 1)}
    return randomized(Small(residual, **parts, head=nn.Linear(8, 5)))


def placed(function: Any, x: Tensor, *, step: PlaceQuantizers = PLACE, **parts: Any) -> tuple[Graph, PassReport]:
    graph = ready(randomized(Small(function, **parts)), x)
    return graph, step.run(graph)


def of(graph: Graph, *targets: object) -> list[fx.Node]:
    return [node for node in graph.nodes if query.is_call(node, *targets)]


def test_picture(golden: Golden) -> None:
    graph = ready(cnn(), sample(3, 2, 7, 6))
    before = graph.text()
    report = PLACE.run(graph)
    assert report.applied == {"convolution": 3, "linear": 1, "convolution-output": 3, "sum": 2}
    assert report.refused == ()
    assert picture(before, graph.text()) == golden


def test_contract_and_numbers() -> None:
    x = sample(3, 2, 7, 6)
    graph = ready(cnn(), x)
    expected = graph.run(x)
    assert check_pass_contract(PLACE, graph, (x,)).changed
    PLACE.run(graph)
    assert torch.equal(graph.run(x)[0], expected[0]), "a request passes its input on"


def test_a_residual_cnn_never_leaves_its_codes() -> None:
    graph = ready(cnn(), sample(3, 2, 7, 6))
    PLACE.run(graph)
    for node in of(graph, ops.ADD, ops.CONV2D):
        operands = node.args[:2] if node.target is ops.ADD else node.args[:1]
        assert all(is_requested(operand) for operand in operands)


def test_only_inputs_where_the_target_wants_no_more() -> None:
    step = PlaceQuantizers(placement=replace(X86_VNNI, convolution_outputs=False))
    graph, report = placed(
        lambda m, x: m.b(m.a(x)).tanh(), sample(2, 8, 5), step=step, a=nn.Conv1d(8, 8, 1), b=nn.Conv1d(8, 8, 1)
    )
    assert report.applied == {"convolution": 2}
    assert [[reader.target for reader in request.readers] for request in requests(graph)] == [[ops.CONV1D]] * 2


def test_readers_share_one_request_and_the_others_read_floats() -> None:
    graph, report = placed(lambda m, x: m.a(x) + m.b(x) + x, sample(3, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    (request,) = requests(graph)
    assert report.applied == {"linear": 2}
    assert [reader.target for reader in request.readers] == [ops.LINEAR, ops.LINEAR]
    assert [reader.target for reader in query.readers(request.source) if reader is not request.node] == [ops.ADD]


REFUSED = [
    pytest.param(lambda m, x: F.linear(x, m.w * x.mean()), Reason.NOT_CONSTANT, "its weight", id="weight (1)"),
    pytest.param(lambda m, x: F.linear(m.w, m.w), Reason.NO_RANGE, "its input is a constant", id="constant (1)"),
    pytest.param(lambda m, x: F.linear(x[:, :7], m.w[:, :7]), Reason.NOT_CONSTANT, "its weight", id="slice (1)"),
    pytest.param(lambda m, x: m.small(x[:, :7]), Reason.TOO_SMALL, "7 inputs per output", id="too small (1)"),
    pytest.param(lambda m, x: torch.erf(x), Reason.UNKNOWN_OPERATOR, "aten.erf", id="unknown (4)"),
    pytest.param(lambda m, x: torch.topk(x, 2)[0], Reason.UNKNOWN_OPERATOR, "aten.topk", id="two results (4)"),
    pytest.param(lambda m, x: x.max(dim=1)[0], Reason.UNKNOWN_OPERATOR, "aten.max.dim", id="the first is floats (4)"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "reason", "detail"), REFUSED)
def test_refusals(function: Any, reason: Reason, detail: str) -> None:
    x = sample(3, 8)
    graph = ready(randomized(Small(function, w=sample(3, 8), small=nn.Linear(7, 3))), x)
    before = graph.text()
    report = PLACE.run(graph)
    found = [(refusal.reason, refusal.detail) for refusal in report.refused]
    assert (reason, detail) in found
    assert not report.changed
    assert graph.text() == before


@pytest.mark.parametrize("dtype", HALVES_AND_DOUBLE)
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(8, 3), (3, 8)), (nn.Conv1d(8, 4, 3), (3, 8, 7))], ids=["linear", "convolution"]
)
def test_other_types_are_refused(dtype: torch.dtype, layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = sample(*shape).to(dtype)
    graph = ready(Small(lambda m, x: m.layer(x).tanh(), layer=layer).to(dtype), x)
    before = graph.text()
    report = PLACE.run(graph)
    assert [(refusal.reason, refusal.detail) for refusal in report.refused] == [(Reason.UNSUPPORTED_TYPE, str(dtype))]
    assert graph.text() == before


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        pytest.param(lambda m, x: m.a(x).relu(), 1, id="it is an output of the model"),
        pytest.param(lambda m, x: ((y := m.a(x).relu()), y.tanh()), 1, id="it is an output besides"),
        pytest.param(lambda m, x: m.narrow(m.a(x).relu()).tanh(), 1, id="the reader is too small"),
        pytest.param(lambda m, x: F.conv1d(m.a(x).relu(), m.w * x.mean()).tanh(), 1, id="the reader's weight varies"),
        pytest.param(lambda m, x: m.narrow(x).relu().tanh(), 0, id="the writer is too small"),
        pytest.param(lambda m, x: F.conv1d(x, m.w * x.mean()).relu().tanh(), 0, id="the writer's weight varies"),
        pytest.param(lambda m, x: m.a(x).relu().tanh(), 2, id="none of these"),
        pytest.param(lambda m, x: torch.erf(m.a(x).relu()), 2, id="an unknown reader reads what the codes stand for"),
    ],
)
def test_what_convolutions_write_stays_float_where_floats_are_read(function: Any, kept: int) -> None:
    parts: dict[str, Any] = {"a": nn.Conv1d(8, 8, 1), "narrow": nn.Conv1d(8, 8, 3, groups=8), "w": sample(8, 8, 1)}
    graph, _ = placed(function, sample(2, 8, 5), **parts)
    assert len(requests(graph)) == kept
    for node in of(graph, ops.CONV1D):
        is_plain = query.is_constant(node.args[1]) and query.shape(node.args[1])[1] == 8  # type: ignore[arg-type]
        assert is_requested(node.args[0]) == is_plain


def test_a_sum_with_a_float_stays_float() -> None:
    graph, report = placed(lambda m, x: (m.a(x) + x.tanh()).tanh(), sample(2, 8, 5), a=nn.Conv1d(8, 8, 1))
    assert report.applied == {"convolution": 1, "convolution-output": 1}
    assert [is_requested(operand) for operand in of(graph, ops.ADD)[0].args[:2]] == [True, False]


def test_what_no_product_reads_has_the_codes_of_what_is_written() -> None:
    narrow, wide = IntegerType(3, signed=False), IntegerType(8, signed=False)
    graph = ready(cnn(), sample(3, 2, 7, 6))
    placement = replace(X86_VNNI, activation=narrow, written=wide)
    PlaceQuantizers(placement=placement).run(graph)
    found = requests(graph)
    multiplied = [query.is_call(reader, ops.LINEAR, *ops.CONVOLUTIONS) for each in found for reader in each.readers]
    assert True in multiplied
    assert False in multiplied
    for each in found:
        reads = any(query.is_call(reader, ops.LINEAR, *ops.CONVOLUTIONS) for reader in each.readers)
        assert each.type == (narrow if reads else wide)


ON_TENSORRT = PlaceQuantizers(placement=tensorrt_placement(Bits(8, 8)))
FLOATS_ON_TENSORRT = PlaceQuantizers(placement=tensorrt_placement(Bits(8, 8), EightBits.FP8))

SKIPS = [
    pytest.param(lambda m, x: (m.a(x) + x).relu(), ["x"], id="the input"),
    pytest.param(lambda m, x: (x.tanh() + m.a(x)).relu(), ["tanh"], id="on the left"),
    pytest.param(lambda m, x: (m.a(x) + m.b(x)).relu(), ["conv1d_1"], id="of two, the second"),
    pytest.param(lambda m, x: (m.a(x) + x.tanh()) + x, ["tanh"], id="a sum is no convolution"),
    pytest.param(lambda m, x: m.a(x).relu() + x, [], id="what is behind a ReLU is none"),
    pytest.param(lambda m, x: m.a(x) + m.w, [], id="a constant"),
    pytest.param(lambda m, x: m.a(x) + 1.0, [], id="a number"),
    pytest.param(lambda m, x: m.narrow(x) + x, [], id="a convolution that stays float"),
    pytest.param(lambda m, x: x.tanh() + x, [], id="no convolution"),
    pytest.param(lambda m, x: m.a(x) - x, [], id="a difference"),
]


@pytest.mark.parametrize(("function", "skips"), SKIPS)
def test_what_is_added_to_a_convolution_has_codes(function: Any, skips: list[str]) -> None:
    parts: dict[str, Any] = {name: nn.Conv1d(8, 8, 1) for name in "ab"}
    parts |= {"narrow": nn.Conv1d(8, 8, 3, padding=1, groups=8), "w": sample(8, 5)}
    x = sample(2, 8, 5)
    graph = ready(randomized(Small(function, **parts)), x)
    expected = graph.run(x)
    assert check_pass_contract(ON_TENSORRT, graph, (x,))
    report = ON_TENSORRT.run(graph)
    assert torch.equal(graph.run(x)[0], expected[0])
    found = [each.source.name for each in requests(graph) if any(r.target is ops.ADD for r in each.readers)]
    assert found == skips
    assert report.applied.get("skip", 0) == len(skips)
    for node in of(graph, ops.CONV1D):
        behind = [reader for reader in query.readers(node) if is_requested(reader)]
        assert bool(behind) == (node.name in skips), "a convolution writes floats"


def test_the_second_of_two_convolutions_codes_are_read_in_the_sum_alone() -> None:
    parts: dict[str, Any] = {name: nn.Conv1d(8, 8, 1) for name in "ab"}
    graph, _ = placed(lambda m, x: (m.a(x) + m.b(x)).relu(), sample(2, 8, 5), step=ON_TENSORRT, **parts)
    (total,) = of(graph, ops.ADD)
    assert [is_requested(operand) for operand in total.args[:2]] == [False, True]


def test_a_skip_shares_its_codes_with_the_convolution_that_reads_it() -> None:
    graph, _ = placed(lambda m, x: (m.a(x) + x).relu(), sample(2, 8, 5), step=ON_TENSORRT, a=nn.Conv1d(8, 8, 1))
    (request,) = requests(graph)
    assert {reader.target for reader in request.readers} == {ops.CONV1D, ops.ADD}
    assert (request.type, request.is_symmetric) == (IntegerType(8, signed=True), True)


@pytest.mark.parametrize("dtype", HALVES_AND_DOUBLE)
def test_skips_of_other_types_stay(dtype: torch.dtype) -> None:
    x = sample(2, 8, 5).to(dtype)
    graph = ready(Small(lambda m, x: m.a(x) + x, a=nn.Conv1d(8, 8, 1)).to(dtype), x)
    ON_TENSORRT.run(graph)
    assert not requests(graph)


def attention(m: Any, x: Tensor) -> Tensor:
    scores: Tensor = m.q(x) @ m.k(x).transpose(-1, -2)
    mixed: Tensor = scores.softmax(-1) @ m.v(x)
    return mixed


def test_of_8_bit_floats_are_linear_maps_and_products_of_attention_but_no_convolutions() -> None:
    parts: dict[str, Any] = {name: nn.Linear(8, 9) for name in "qkv"}
    graph, report = placed(
        lambda m, x: attention(m, m.c(x)), sample(2, 5, 8), step=FLOATS_ON_TENSORRT, c=nn.Conv1d(5, 6, 1), **parts
    )
    assert report.applied == {"linear": 3, "operand": 4}
    assert [(each.reason, each.detail) for each in report.refused] == [
        (Reason.NO_KERNEL, "a convolution of 8-bit floats")
    ]
    assert {each.type for each in requests(graph)} == {FLOAT8}
    assert all(is_requested(operand) for node in of(graph, ops.MATMUL) for operand in node.args[:2])
    assert not any(is_requested(node.args[0]) for node in of(graph, ops.CONV1D))
