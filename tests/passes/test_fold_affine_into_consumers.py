"""An affine before linear maps goes into all of them, exactly, or stays for a documented reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE
from normfuse.nn import UnifiedNorm
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_affine_into_consumers import FoldAffineIntoConsumers
from normfuse.passes.fold_affine_into_producers import FoldAffineIntoProducers
from normfuse.passes.presets import CANONICAL
from normfuse.pipeline import Phase, Pipeline
from normfuse.report import Reason
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, sample


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, Phase("norms", (FindAffines(), FoldAffineIntoProducers())))).run(graph)
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
    (site,) = report.sites
    assert (site["affine"], site["into"], site["repair"]) == ("norm", "reduce, first, head, q, k", "")
    assert site["formula"] == "W' = W diag(a), b' = b + W c"
    assert picture(before, graph.text()) == golden


def test_numbers_and_contract() -> None:
    model, x = randomized(Decoder()).double(), sample(2, 8, 6)
    graph = ready(model, x)
    assert check_pass_contract(FoldAffineIntoConsumers(), graph, (x,)).changed
    FoldAffineIntoConsumers().run(graph)
    assert distance(graph.run(x), [model(x)]) < 1e-12


def with_a_negative_scale(model: Small) -> nn.Module:
    found: Any = randomized(model).double()
    with torch.no_grad():
        found.n.weight[1] = -0.7
    return model


TOKENS = (4, 7, 5)
REFUSALS = [
    pytest.param(lambda m, x: m.n(x), TOKENS, Reason.GRAPH_OUTPUT, id="an output"),
    pytest.param(lambda m, x: m.f(m.n(x).relu()), TOKENS, Reason.NONLINEAR_READER, id="nonlinear"),
    pytest.param(lambda m, x: m.n(x).softmax(-1), TOKENS, Reason.NONLINEAR_READER, id="softmax"),
    pytest.param(lambda m, x: m.f(m.n(x) * x), TOKENS, Reason.NONLINEAR_READER, id="a product"),
    pytest.param(lambda m, x: m.f(x.softmax(1).mT @ m.n(x)), TOKENS, Reason.NONLINEAR_READER, id="mixed by weights"),
    pytest.param(lambda m, x: m.f(m.n(x) + x.sin()), TOKENS, Reason.STREAM_READER, id="the stream"),
    pytest.param(lambda m, x: m.f(torch.add(m.n(x), x, alpha=2)), TOKENS, Reason.NONLINEAR_READER, id="alpha"),
    pytest.param(lambda m, x: m.f(m.n(x) + m.p(x.sin())), TOKENS, Reason.STREAM_READER, id="another norm's sum"),
    pytest.param(lambda m, x: m.f((y := m.n(x)) + y.flip(2)), TOKENS, Reason.UNNORMED_TOKENS, id="its channels turned"),
    pytest.param(lambda m, x: m.f(torch.cat([m.n(x), x], 1)), TOKENS, Reason.UNNORMED_TOKENS, id="tokens joined"),
    pytest.param(
        lambda m, x: m.f(torch.cat([y := m.n(x), y.flip(2)], 1)), TOKENS, Reason.UNNORMED_TOKENS, id="turned and joined"
    ),
    pytest.param(
        lambda m, x: m.f(torch.cat([m.n(x), m.p(x.sin())], 1)), TOKENS, Reason.UNNORMED_TOKENS, id="tokens of two norms"
    ),
    pytest.param(
        lambda m, x: m.f(torch.cat([m.k.expand(x.shape[0], 1, 5), m.n(x)], 1)),
        TOKENS,
        Reason.UNNORMED_TOKENS,
        id="class token",
    ),
    pytest.param(lambda m, x: nn.functional.linear(m.n(x), x[0, :3]), TOKENS, Reason.NOT_CONSTANT, id="weight (1)"),
    pytest.param(
        lambda m, x: nn.functional.linear(m.n(x), m.k[0, 0]), TOKENS, Reason.NOT_CONSTANT, id="a vector as weight (1)"
    ),
    pytest.param(lambda m, x: m.h(m.n(x).mT), TOKENS, Reason.AXIS, id="another axis (3)"),
    pytest.param(lambda m, x: m.f(m.n(x).mT), (4, 5, 5), Reason.AXIS, id="another axis of the same size (3)"),
    pytest.param(lambda m, x: m.f(m.n(x).reshape(-1, 5, 5).mT), (4, 5, 5), Reason.AXIS, id="so behind views (3)"),
    pytest.param(lambda m, x: m.h(m.n(x).mean(2)), TOKENS, Reason.AXIS, id="mean of the channels (3)"),
    pytest.param(lambda m, x: m.u(m.n(x).reshape(-1, 7)), TOKENS, Reason.AXIS, id="cut across the channels (3)"),
    pytest.param(lambda m, x: m.f(m.n(x).roll(3)), TOKENS, Reason.AXIS, id="rolled as if flat (3)"),
    pytest.param(
        lambda m, x: m.f(nn.functional.pad(m.n(x), (0, 0, 1, 1))), TOKENS, Reason.ZERO_PADDING, id="zeros padded (5)"
    ),
    pytest.param(
        lambda m, x: m.f(nn.functional.pad(m.n(x), (0, 0, 1, 1), value=0.5)),
        TOKENS,
        Reason.PADDED_VALUE,
        id="a number padded (5)",
    ),
    pytest.param(
        lambda m, x: m.w(nn.functional.unfold(m.n(x).mT[..., None], (2, 1), padding=(1, 0)).mT),
        TOKENS,
        Reason.NONLINEAR_READER,
        id="patches with zeros (5)",
    ),
    pytest.param(
        lambda m, x: m.c(nn.functional.max_pool1d(m.n(x).mT, 2)), TOKENS, Reason.NEGATIVE_SCALE, id="maximum (5)"
    ),
    pytest.param(
        lambda m, x: m.c(nn.functional.avg_pool1d(m.n(x).mT, 2, padding=1)),
        TOKENS,
        Reason.ZERO_PADDING,
        id="zeros averaged (5)",
    ),
]


@pytest.mark.parametrize(("function", "shape", "reason"), REFUSALS)
def test_refusals(function: Any, shape: tuple[int, ...], reason: Reason) -> None:
    parts: dict[str, Any] = {"f": nn.Linear(5, 3), "h": nn.Linear(7, 3), "u": nn.Linear(7, 2)}
    parts |= {"c": nn.Conv1d(5, 3, 2), "p": UnifiedNorm(5), "k": sample(1, 1, 5), "w": nn.Linear(10, 3)}
    graph = ready(with_a_negative_scale(Small(function, n=UnifiedNorm(5), **parts)), sample(*shape))
    before = graph.text()
    report = FoldAffineIntoConsumers().run(graph)
    assert not report.changed
    assert {refusal.reason for refusal in report.refused} == {reason}
    assert report.refused[0].layer == "n"
    assert graph.text() == before


def test_constants_that_do_not_fit_stay_away() -> None:
    model = Small(lambda m, x: m.f(x * 6e4), f=nn.Linear(5, 3))
    with torch.no_grad():
        model.f.weight.fill_(4.0)  # type: ignore[union-attr, operator]
    graph = ready(model.half(), sample(4, 5).half())
    report = FoldAffineIntoConsumers().run(graph)
    assert not report.changed
    assert [refusal.reason for refusal in report.refused] == [Reason.OVERFLOW]


def test_where_the_size_is_not_known_a_scale_of_zero_leaves_no_repair() -> None:
    scale = torch.tensor([1.0, 0.0, -2.0]).double().reshape(3, 1)
    model = Small(lambda m, x: m.c(x * m.s + 1), c=nn.Conv1d(3, 4, 3, padding=1).double(), s=scale)
    length = torch.export.Dim.AUTO
    program = torch.export.export(model.eval(), (sample(2, 3, 7),), dynamic_shapes=({0: length, 2: length},))
    graph = capture(program)
    Pipeline(phases=(CANONICAL, Phase("norms", (FindAffines(), FoldAffineIntoProducers())))).run(graph)
    report = FoldAffineIntoConsumers().run(graph)
    assert [refusal.reason for refusal in report.refused] == [Reason.ZERO_PADDING]


READERS = [
    pytest.param(lambda m, x, y: m.f(y).relu() + y.tanh()[..., :3], id="nonlinear"),
    pytest.param(lambda m, x, y: (y, m.f(y)), id="an output"),
    pytest.param(lambda m, x, y: y + m.g(m.f(y).relu()), id="the stream"),
    pytest.param(lambda m, x, y: (m.f(y), y.softmax(-1), m.f(y.roll(2, 1)), y.exp()), id="two of each"),
    pytest.param(lambda m, x, y: (m.f(torch.cat([y, x], -1)[..., :5]), y.amax(-1)), id="through a concatenation"),
    pytest.param(lambda m, x, y: m.f(y) + m.c(nn.functional.max_pool1d(y.mT, 1)).mT, id="a maximum"),
    pytest.param(lambda m, x, y: m.f(y) + m.c(nn.functional.pad(y.mT, (2, 3)))[..., :7].mT, id="zeros padded"),
    pytest.param(lambda m, x, y: (m.f(y[:, 0]), m.f(y.mean(1)) @ y.mT[..., :3, :]), id="a product"),
    pytest.param(lambda m, x, y: (m.f(z := y.flip(1)), z.relu()), id="both behind one view"),
]


@pytest.mark.parametrize("function", READERS)
def test_linear_readers_take_it_and_the_others_keep_it(function: Any) -> None:
    parts = {"n": UnifiedNorm(5), "f": nn.Linear(5, 3), "g": nn.Linear(3, 5), "c": nn.Conv1d(5, 3, 1)}
    model = with_a_negative_scale(Small(lambda m, x: function(m, x, m.n(x)), **parts))
    graph = ready(model, x := sample(2, 7, 5))
    report = check_pass_contract(FoldAffineIntoConsumers(), graph, (x,))
    is_shared_view = not report.changed
    FoldAffineIntoConsumers().run(graph)
    assert sum(query.is_call(node, AFFINE) for node in graph.nodes) == 1
    linears = [node for node in graph.nodes if query.is_call(node, ops.LINEAR)]
    sources = [query.is_call(node.args[0], AFFINE) for node in linears]
    assert not any(sources) or is_shared_view
    expected = model(x)
    assert distance(graph.run(x), expected if isinstance(expected, tuple) else [expected]) < 1e-12


def test_gamma_and_beta_of_layer_norm_cost_nothing_where_another_reader_keeps_them() -> None:
    parts = {"n": nn.LayerNorm(5), "f": nn.Linear(5, 3)}
    graph = ready(randomized(Small(lambda m, x: (m.f(y := m.n(x)), y.relu()), **parts)), sample(2, 7, 5).float())
    report = FoldAffineIntoConsumers().run(graph)
    assert [refusal.reason for refusal in report.refused] == [Reason.FREE]
    assert not report.changed


THROUGH = [
    pytest.param(lambda m, x, y: m.f(nn.functional.dropout(y, 0.5, m.training)), id="dropout in eval mode"),
    pytest.param(lambda m, x, y: m.f(y[:, 2::3]), id="token selection"),
    pytest.param(lambda m, x, y: m.f(y.index_select(1, m.i)), id="tokens by index"),
    pytest.param(lambda m, x, y: m.f(y.mean(1)), id="mean of tokens"),
    pytest.param(lambda m, x, y: m.f3((p := y.chunk(2, -1))[0]) + m.f3(p[1]), id="chunks"),
    pytest.param(lambda m, x, y: m.f2((p := y.split([2, 4], -1))[0]) + m.f4(p[1]), id="a split"),
    pytest.param(lambda m, x, y: m.f(torch.cat([t[:, None] for t in y.unbind(1)[1:4]], 1)), id="unbound and joined"),
    pytest.param(lambda m, x, y: m.f12(torch.cat([y, x.exp()], -1)), id="channels joined with un-normed ones"),
    pytest.param(lambda m, x, y: m.f12(torch.cat([y, m.n(x.exp())], -1)), id="channels of two norms joined"),
    pytest.param(lambda m, x, y: m.f(torch.cat([y, y.flip(1)], 1)), id="tokens of one norm joined"),
    pytest.param(lambda m, x, y: m.f(y + y.roll(1, 1) - y.flip(1)), id="sums of one norm"),
    pytest.param(lambda m, x, y: m.f(m.n(y.roll(1, 1))), id="another norm"),
    pytest.param(
        lambda m, x, y: m.d(nn.functional.max_pool1d((x * m.positive - 1).mT, 2)) + m.d(y.mT[..., :4]),
        id="maxima of positive scales",
    ),
    pytest.param(
        lambda m, x, y: m.f(
            y.unflatten(1, (4, 2)).roll((-1, 1), (1, 2)).unflatten(1, (2, 2)).transpose(2, 3).flatten(1, 2)
        ),
        id="rolled, then windows",
    ),
    pytest.param(
        lambda m, x, y: m.c(nn.functional.interpolate(y.mT.unflatten(2, (4, 2)), scale_factor=2, mode="bilinear")),
        id="bilinear upsampling",
    ),
    pytest.param(
        lambda m, x, y: m.c(nn.functional.interpolate(y.mT.unflatten(2, (4, 2)), scale_factor=3)), id="nearest"
    ),
    pytest.param(lambda m, x, y: m.c(nn.functional.avg_pool2d(y.mT.unflatten(2, (4, 2)), 2)), id="average pooling"),
    pytest.param(
        lambda m, x, y: m.f(nn.functional.adaptive_avg_pool2d(y.mT.unflatten(2, (4, 2)), 1).flatten(1)), id="global"
    ),
    pytest.param(
        lambda m, x, y: m.c(nn.functional.pad(y.mT.unflatten(2, (4, 2)), (1, 1, 1, 1), mode="reflect")), id="reflected"
    ),
    pytest.param(lambda m, x, y: m.c(y.mT.unflatten(2, (4, 2)))[..., 0] + m.d(y.mT[..., :3]), id="convolutions"),
    pytest.param(lambda m, x, y: m.f(y.repeat(1, 2, 1)) + m.f(y[:, :1].expand(-1, 16, -1)), id="repeated, expanded"),
]


@pytest.mark.parametrize("function", THROUGH)
def test_goes_through(function: Any) -> None:
    """Each is right, folded; that the affine moved as it is would be wrong is `test_commuting`'s matter."""
    parts: dict[str, Any] = {
        "n": UnifiedNorm(6),
        "f": nn.Linear(6, 3),
        "c": nn.Conv2d(6, 3, (2, 1)),
        "f4": nn.Linear(4, 3),
    }
    parts |= {"f2": nn.Linear(2, 3), "f3": nn.Linear(3, 2), "f12": nn.Linear(12, 5), "d": nn.Conv1d(6, 3, 1)}
    parts["positive"] = sample(6).abs()
    model = randomized(Small(lambda m, x: function(m, x, m.n(x)), **parts, i=torch.tensor([1, 6, 1]))).double()
    graph = ready(model, x := sample(2, 8, 6))
    assert check_pass_contract(FoldAffineIntoConsumers(), graph, (x,)).changed
    FoldAffineIntoConsumers().run(graph)
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)
    assert distance(graph.run(x), [model(x)]) < 1e-10


class Dense(nn.Module):
    """Every layer's norm reads all that came before it (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(5), nn.BatchNorm2d(7)])
        self.convs = nn.ModuleList([nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1), nn.Conv2d(7, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x))], 1)
        return x


def test_dense_concatenations() -> None:
    model = randomized(Dense()).double()
    graph = ready(model, x := sample(2, 3, 6, 5))
    FoldAffineIntoConsumers().run(graph)
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)
    assert distance(graph.run(x), [model(x)]) < 1e-10
