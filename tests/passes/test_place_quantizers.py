"""Requests stand where the target wants codes, and what stays float is named with its reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.quantization import is_requested, requests
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.quant import IntegerType
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
