"""An affine before linear maps goes into all of them, exactly, or stays for a documented reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture
from normfuse.nn import UnifiedNorm
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_affine_into_consumers import FoldAffineIntoConsumers, fold_before
from normfuse.passes.fold_affine_into_producer import FoldAffineIntoProducer
from normfuse.passes.presets import CANONICAL
from normfuse.pipeline import Phase, Pipeline
from normfuse.report import Reason
from normfuse.testing import Golden, Small, check_pass_contract, distance, fold_tolerance, picture, randomized, seeded


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9), dtype=torch.float64)


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, Phase("norms", (FindAffines(), FoldAffineIntoProducer())))).run(graph)
    return graph


class Decoder(nn.Module):
    """One norm, five readers: three linear maps, a strided convolution behind views, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(6), nn.Conv2d(6, 4, 2, stride=2, bias=False)
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)
        self.first, self.head = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        reduced = self.reduce(y.transpose(1, 2).reshape(-1, 6, 4, 2)).flatten(2)
        pooled = self.first(y[:, 0]) + self.head(y.mean(1))
        mixed: Tensor = (self.q(y) @ self.k(y).mT).mean((1, 2))[:, None] * pooled + reduced.mean((1, 2))[:, None]
        return mixed


def test_picture(golden: Golden) -> None:
    graph = ready(randomized(Decoder()), sample(2, 8, 6).float())
    before = graph.text()
    report = FoldAffineIntoConsumers().run(graph)
    assert report.applied == {"fold-before-linear": 1}
    assert report.sites == (
        {"affine": "norm", "into": "reduce, first, head, q, k", "formula": "W' = W diag(a), b' = b + W c"},
    )
    assert picture(before, graph.text()) == golden


def test_numbers_and_contract() -> None:
    model, x = randomized(Decoder()).double(), sample(2, 8, 6)
    graph = ready(model, x)
    assert check_pass_contract(FoldAffineIntoConsumers(), graph, (x,)).changed
    FoldAffineIntoConsumers().run(graph)
    assert distance(graph.run(x), [model(x)]) < 1e-12


REFUSALS = [
    pytest.param(lambda m, x: (y := m.n(x), m.f(y)), (4, 7, 5), Reason.GRAPH_OUTPUT, id="an output"),
    pytest.param(lambda m, x: (y := m.n(x)) + m.g(y), (4, 7, 5), Reason.STREAM_READER, id="the stream"),
    pytest.param(lambda m, x: m.f(m.n(x).relu()), (4, 7, 5), Reason.NONLINEAR_READER, id="nonlinear"),
    pytest.param(lambda m, x: m.f(torch.cat([m.n(x), x], 1)), (4, 7, 5), Reason.NONLINEAR_READER, id="cat of tokens"),
    pytest.param(
        lambda m, x: m.f(nn.functional.pad(m.n(x), (0, 0, 1, 1))),
        (4, 7, 5),
        Reason.NONLINEAR_READER,
        id="padded tokens",
    ),
    pytest.param(lambda m, x: nn.functional.linear(m.n(x), x[0, :3]), (4, 7, 5), Reason.NOT_CONSTANT, id="weight (1)"),
    pytest.param(lambda m, x: m.h(m.n(x).mT), (4, 7, 5), Reason.AXIS, id="another axis (2)"),
    pytest.param(lambda m, x: m.f(m.n(x).mT), (4, 5, 5), Reason.AXIS, id="another axis of the same size (2)"),
    pytest.param(lambda m, x: m.f(m.n(x).reshape(-1, 5, 5).mT), (4, 5, 5), Reason.AXIS, id="so behind views (2)"),
    pytest.param(lambda m, x: m.s(m.n(x)[..., 1:]), (4, 7, 5), Reason.AXIS, id="some of the channels (2)"),
    pytest.param(lambda m, x: m.h(m.n(x)[..., 1]), (4, 7, 5), Reason.AXIS, id="one of the channels (2)"),
    pytest.param(lambda m, x: m.h(m.n(x).mean(2)), (4, 7, 5), Reason.AXIS, id="mean of the channels (2)"),
    pytest.param(lambda m, x: m.w(m.n(x).flatten(1)), (4, 7, 5), Reason.AXIS, id="merged into another axis (2)"),
    pytest.param(lambda m, x: m.c(m.n(x).mT), (4, 7, 5), Reason.ZERO_PADDING, id="zero padding (3)"),
    pytest.param(lambda m, x: m.t(m.n(x).mT), (4, 7, 5), Reason.TRANSPOSED, id="transposed convolution"),
]


@pytest.mark.parametrize(("function", "shape", "reason"), REFUSALS)
def test_refusals(function: Any, shape: tuple[int, ...], reason: Reason) -> None:
    parts: dict[str, nn.Module] = {"f": nn.Linear(5, 3), "g": nn.Linear(5, 5), "h": nn.Linear(7, 3)}
    parts |= {"s": nn.Linear(4, 3), "w": nn.Linear(35, 3), "c": nn.Conv1d(5, 3, 3, padding=1)}
    parts |= {"t": nn.ConvTranspose1d(5, 3, 2)}
    graph = ready(randomized(Small(function, n=UnifiedNorm(5), **parts)).double(), sample(*shape))
    before = graph.text()
    report = FoldAffineIntoConsumers().run(graph)
    assert not report.changed
    assert [refusal.reason for refusal in report.refused] == [reason]
    assert report.refused[0].layer == "n"
    assert graph.text() == before


def test_one_reader_that_refuses_keeps_the_affine_for_all() -> None:
    parts = {"n": UnifiedNorm(5), "f": nn.Linear(5, 3), "c": nn.Conv1d(5, 3, 3, padding=1)}
    model = randomized(Small(lambda m, x: m.f(y := m.n(x)) + m.c(y.mT).mT, **parts)).double()
    graph = ready(model, x := sample(2, 7, 5))
    expected = graph.run(x)
    assert [refusal.reason for refusal in FoldAffineIntoConsumers().run(graph).refused] == [Reason.ZERO_PADDING]
    assert torch.equal(graph.run(x)[0], expected[0])


def test_zero_padding_commutes_with_a_scale() -> None:
    parts = {"n": UnifiedNorm(5), "c": nn.Conv1d(5, 3, 3, padding=2, dilation=2)}
    model = randomized(Small(lambda m, x: m.c(m.n(x).mT), **parts)).double()
    with torch.no_grad():
        model.n.bias.zero_()  # type: ignore[union-attr, operator]
    graph = ready(model, x := sample(2, 9, 5))
    assert FoldAffineIntoConsumers().run(graph).applied == {"fold-before-linear": 1}
    assert distance(graph.run(x), [model(x)]) < 1e-12


def test_the_naive_fold_is_wrong_at_the_border_and_right_inside() -> None:
    """What the refusal of zero padding prevents; were it dropped, the folds' own tests would see the border."""
    conv = randomized(nn.Conv2d(3, 4, 3, padding=1)).double().requires_grad_(False)
    scale, shift = sample(3), sample(3) + 1
    x = sample(2, 3, 7, 6)
    true = conv(x * scale.view(3, 1, 1) + shift.view(3, 1, 1))
    weight, bias = fold_before(conv.weight, conv.bias, scale=scale, shift=shift)
    error = (nn.functional.conv2d(x, weight, bias, padding=1) - true).abs()
    inside = error[:, :, 1:-1, 1:-1]
    border = torch.cat([error[:, :, 0], error[:, :, -1]], -1)
    assert float(inside.max()) < 1e-14
    assert float(border.min(dim=0).values.max()) > 0.1
    graph = capture(conv, (x,))
    # The tolerance of the folds' tests is far below the error, in float32 too.
    assert float(border.max()) > 1e4 * fold_tolerance(capture(conv.float(), (x.float(),)), x.float())
    assert float(border.max()) > 1e4 * fold_tolerance(graph, x)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        pytest.param(nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), id="strided"),
        pytest.param(nn.Conv1d(6, 4, 2, groups=2), (2, 6, 9), id="grouped"),
        pytest.param(nn.Conv2d(4, 8, (2, 3), groups=4, bias=False), (2, 4, 5, 6), id="depthwise, no bias"),
        pytest.param(nn.Conv3d(4, 2, 2, dilation=(1, 2, 1)), (2, 4, 3, 4, 5), id="three axes"),
    ],
)
def test_the_arithmetic_of_convolutions(conv: Any, shape: tuple[int, ...]) -> None:
    conv, x, channels = conv.double(), sample(*shape), shape[1]
    scale, shift = sample(channels), sample(channels) + 1
    wide = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
    expected = conv(x * scale.reshape(wide) + shift.reshape(wide))
    weight, bias = fold_before(conv.weight, conv.bias, scale=scale, shift=shift, groups=conv.groups)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    torch.testing.assert_close(conv(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_arithmetic_is_rounded_once(dtype: torch.dtype) -> None:
    weight, bias, scale, shift = sample(3, 5).to(dtype), sample(3).to(dtype), sample(5) * 3, sample(5) + 1
    folded_weight, folded_bias = fold_before(weight, bias, scale=scale, shift=shift)
    assert torch.equal(folded_weight, (weight.double() * scale).to(dtype))
    exact = bias.double() + weight.double() @ shift
    # Half a unit in the last place, and as much again for the order of the sum in float64.
    assert float((folded_bias.double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())
