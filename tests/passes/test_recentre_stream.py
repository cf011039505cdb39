"""Layer norms that read a centred stream are RMS norms, or stay for a documented reason (methods 4)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.passes.presets import AFFINES, CANONICAL, folds
from normfuse.passes.recentre_stream import RecentreStream
from normfuse.pipeline import Pipeline
from normfuse.report import Reason
from normfuse.testing import (
    Golden,
    Small,
    check_pass_contract,
    distance,
    fold_tolerance,
    outputs,
    picture,
    randomized,
    sample,
    seeded,
)

EXACT = 1e-10
WRONG = 1e-3


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, AFFINES, folds())).run(graph)
    return graph


def count(graph: Graph, operator: Any) -> int:
    return sum(query.is_call(node, operator) for node in graph.nodes)


class DropPath(nn.Module):
    """Drops whole branches in training, nothing in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x[:, :1, :1], 0.5)) if self.training else x


class Block(nn.Module):
    """Two branches with layer scales behind their own layer norms; the first mixes tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-3)
        self.qkv, self.proj = nn.Linear(width, 12), nn.Linear(4, width)
        self.first, self.last = nn.Linear(width, 11), nn.Linear(11, width, bias=False)
        self.scales, self.drop = nn.Parameter(torch.ones(2, width)), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.drop(self.proj(F.scaled_dot_product_attention(q, k, v)) * self.scales[0])
        result: Tensor = x + self.drop(self.scales[1] * self.last(F.gelu(self.first(self.norm2(x)))))
        return result


class ViT(nn.Module):
    """A patch convolution, a class token, a position table, blocks, a head on the class token."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, width, 2, 2), nn.Parameter(torch.zeros(1, 1, width))
        self.positions, self.blocks = nn.Parameter(torch.zeros(1, 7, width)), nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions)
        result: Tensor = self.head(self.norm(x)[:, 0])
        return result


class Words(nn.Module):
    """Embeddings of words and places; the head is the table of words."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, width), nn.Embedding(6, width)
        self.block, self.norm = Block(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.norm(self.block(y)), self.words.weight)


class Turned(nn.Module):
    """A channels-first stream: it is pooled, upsampled by a transposed convolution, and read turned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 5, 1), nn.ConvTranspose2d(5, 6, 2, stride=2)
        self.norm, self.last, self.head = nn.LayerNorm(5), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.pad(self.stem(x), (1, 0, 1, 1)), 2, padding=1)
        x = self.up(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        result: Tensor = self.head(self.last(x.flatten(2).transpose(1, 2).roll(1, 1)))
        return result


def parts(width: int = 5) -> dict[str, Any]:
    return {
        "f": nn.Linear(4, width),
        "n": nn.LayerNorm(width),
        "g": nn.Linear(width, 3),
        "h": nn.Linear(3, width),
        "b": nn.LayerNorm(width, elementwise_affine=False),
    }


def test_picture(golden: Golden) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.c.expand(x.shape[0], -1, -1), m.f(x)], 1) + m.p
        result: Tensor = m.g(m.n(y + m.h(torch.tanh(m.g(m.n(y))))))
        return result

    tables = {"c": nn.Parameter(torch.ones(1, 1, 5)), "p": nn.Parameter(torch.ones(7, 5))}
    graph = ready(randomized(Small(function, **parts(), **tables)), sample(2, 6, 4).float())
    before = graph.text()
    report = RecentreStream().run(graph)
    assert report.applied == {"layer-norm-is-rms-norm": 1}
    (site,) = report.sites
    assert site["affine"] == "n, n"
    assert {"f", "h"} <= set(site["into"].split(", "))
    assert picture(before, graph.text()) == golden


MODELS: dict[str, Any] = {
    "class token, layer scale, attention": (ViT, lambda: sample(2, 3, 4, 6), 5),
    "embeddings, a tied head": (Words, lambda: torch.randint(0, 13, (2, 6), generator=seeded(2)), 3),
    "convolutions": (Turned, lambda: sample(2, 3, 5, 7), 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_contract(name: str) -> None:
    make, given, norms = MODELS[name]
    model, x = randomized(make()).double(), given()
    graph = ready(model, x)
    assert check_pass_contract(RecentreStream(), graph, (x,)).refused == ()
    RecentreStream().run(graph)
    assert count(graph, ops.LAYER_NORM) == 0
    assert count(graph, ops.RMS_NORM) == norms
    assert distance(graph.run(x), outputs(model, x)) < EXACT
    assert distance(graph.run(x[:1]), outputs(model, x[:1])) < EXACT


@pytest.mark.parametrize("seed", [1, 2])
def test_float32_differs_by_rounding(seed: int) -> None:
    model, x = randomized(Turned(), seed=seed), sample(2, 3, 5, 7).float()
    graph = ready(model, x)
    tolerance = fold_tolerance(graph, x)
    RecentreStream().run(graph)
    assert count(graph, ops.LAYER_NORM) == 0
    torch.testing.assert_close(graph.run(x)[0], outputs(model, x)[0], rtol=0, atol=tolerance)


def test_every_writer_must_be_centred() -> None:
    """T6: one writer left as it was, and the model is another one."""
    model, x = randomized(ViT()).double(), sample(2, 3, 4, 6)
    graph = ready(model, x)
    before = dict(graph.module.named_buffers())
    RecentreStream().run(graph)
    assert distance(graph.run(x), outputs(model, x)) < EXACT
    constants = dict(graph.module.named_buffers())
    for name in ("patch.weight", "patch.bias", "cls", "positions", "blocks.0.proj.weight", "blocks.1.proj.bias"):
        found = constants.get(f"{name}_1", constants.get(name))
        assert found is not None
        centred = found.clone()
        assert float(centred.sum(0 if name.endswith(("weight", "bias")) else -1).abs().max()) < EXACT
        found.copy_(before[name])
        assert distance(graph.run(x), outputs(model, x)) > WRONG, name
        found.copy_(centred)


def test_the_stream_splits_and_joins_again() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.f(x) + m.t
        first, last = y.split([2, 5], 1)
        kept, pooled = (first + m.h(m.g(m.n(first)).sin())) * -0.5, last[:, 1::2] - last.mean(1, keepdim=True)
        z = torch.cat([pooled.flip(1), kept, y.unbind(1)[3][:, None]], 1)
        result: Tensor = m.g(m.n(z)).sum(1) + m.g(m.b(z[:, 0]))
        return result

    model = randomized(Small(function, **parts(), t=nn.Parameter(torch.ones(7, 5)))).double()
    graph = ready(model, x := sample(2, 7, 4))
    assert check_pass_contract(RecentreStream(), graph, (x,)).applied == {"layer-norm-is-rms-norm": 1}
    RecentreStream().run(graph)
    assert (count(graph, ops.LAYER_NORM), count(graph, ops.RMS_NORM)) == (0, 3)
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_a_table_of_integers_is_centred_as_numbers() -> None:
    table = torch.arange(35).reshape(7, 5) ** 2 % 11
    model = randomized(Small(lambda m, x: m.g(m.b(m.f(x) + m.t)), **parts(), t=table)).double()
    graph = ready(model, x := sample(2, 7, 4))
    RecentreStream().run(graph)
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_a_norm_that_keeps_its_beta_stays_and_the_stream_is_centred() -> None:
    """Condition 3: a layer norm of a centred stream is the same; its neighbour becomes an RMS norm."""
    model = randomized(Small(lambda m, x: m.g(m.b(y := m.f(x))) + m.n(y).relu()[..., :3], **parts())).double()
    graph = ready(model, x := sample(2, 7, 4))
    report = check_pass_contract(RecentreStream(), graph, (x,))
    assert report.applied == {"layer-norm-is-rms-norm": 1}
    assert [(refusal.reason, refusal.layer) for refusal in report.refused] == [(Reason.ONLINE, "n")]
    RecentreStream().run(graph)
    assert (count(graph, ops.LAYER_NORM), count(graph, ops.RMS_NORM)) == (1, 1)
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_gamma_alone_may_stay() -> None:
    given = {**parts(), "n": nn.LayerNorm(5, bias=False)}
    model = randomized(Small(lambda m, x: m.n(m.f(x)).relu(), **given)).double()
    graph = ready(model, x := sample(2, 7, 4))
    assert RecentreStream().run(graph).refused == ()
    assert count(graph, ops.LAYER_NORM) == 0
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_one_weight_in_the_stream_and_elsewhere() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.g(m.b(m.f(x))) + m.f(x.cos())[..., :3].exp()
        return result

    model = randomized(Small(function, **parts())).double()
    graph = ready(model, x := sample(2, 7, 4))
    assert RecentreStream().run(graph).changed
    assert distance(graph.run(x), outputs(model, x)) < EXACT


class Bert(nn.Module):
    """Post-norm: the output of a norm with beta is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 5)
        self.first, self.last = nn.LayerNorm(5), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.f(x))
        result: Tensor = self.g(self.last(x + self.h(self.g(x).tanh())))
        return result


class Merging(nn.Module):
    """Swin: the norm behind the patches writes the stream; the next one reads four vectors joined."""

    def __init__(self, *, joins: bool = False, embeds: bool = True) -> None:
        super().__init__()
        self.f, self.first, self.g = nn.Linear(4, 5), nn.LayerNorm(5) if embeds else nn.Identity(), nn.Linear(20, 3)
        self.wide, self.joins = nn.LayerNorm(20), joins

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.f(x)).unflatten(1, (2, 2, 2, 2))
        if self.joins:
            x = torch.cat([x[:, :, i, :, j] for i in (0, 1) for j in (0, 1)], -1)
        else:
            x = x.permute(0, 1, 3, 2, 4, 5).flatten(3)
        result: Tensor = self.g(self.wide(x))
        return result


TOKENS = (2, 16, 4)
REFUSALS = [
    pytest.param(lambda m, x: m.g(m.b(y := m.f(x))) + m.k(y), {"k": nn.Linear(5, 3)}, [Reason.STREAM_READER], id="map"),
    pytest.param(lambda m, x: m.g(m.b(y := m.f(x))) + y.relu().sum(), {}, [Reason.STREAM_READER], id="relu (1)"),
    pytest.param(lambda m, x: (m.g(m.b(y := m.f(x))), y), {}, [Reason.GRAPH_OUTPUT], id="an output (1)"),
    pytest.param(lambda m, x: (m.g(m.b(y := m.f(x))), y.mT), {}, [Reason.GRAPH_OUTPUT], id="a turned output (1)"),
    pytest.param(lambda m, x: m.g(m.b(y := m.f(x))) @ y.mT[:, :3], {}, [Reason.STREAM_READER], id="a product (1)"),
    pytest.param(
        lambda m, x: m.g(m.b(y := m.f(x))) + y.mean(-1, keepdim=True), {}, [Reason.STREAM_READER], id="its mean (1)"
    ),
    pytest.param(
        lambda m, x: m.g(m.b(y := m.f(x))) + m.g(m.r(y)),
        {"r": nn.RMSNorm(5, eps=1e-3, elementwise_affine=False)},
        [Reason.STREAM_READER],
        id="an RMS norm (1)",
    ),
    pytest.param(
        lambda m, x: m.g(m.b(y := m.f(x))) + F.layer_norm(y, (16, 5)).sum(),
        {},
        [Reason.STREAM_READER, Reason.SEVERAL_AXES],
        id="a norm over tokens too (1)",
    ),
    pytest.param(
        lambda m, x: m.g(m.b(y := m.o(x))) + F.layer_norm(y.mT, (16,)).sum(),
        {"o": nn.Linear(4, 5)},
        [Reason.STREAM_READER, Reason.UNCENTRED],
        id="a norm over the tokens (1)",
    ),
    pytest.param(
        lambda m, x: m.g(m.b(y := m.f(x))) + F.layer_norm(y[..., :3], (3,)),
        {},
        [Reason.STREAM_READER, Reason.UNCENTRED],
        id="a norm over some channels (1)",
    ),
    pytest.param(
        lambda m, x: m.k(m.w(torch.cat([m.f(x), m.f(x.sin())], -1))),
        {"w": nn.LayerNorm(10), "k": nn.Linear(10, 3)},
        [Reason.UNCENTRED],
        id="two vectors joined (1)",
    ),
    pytest.param(lambda m, x: m.k(m.b(x)), {"b": nn.LayerNorm(4), "k": nn.Linear(4, 3)}, [Reason.UNCENTRED], id="x"),
    pytest.param(lambda m, x: m.g(m.b(m.f(x) + x.sum())), {}, [Reason.UNCENTRED], id="x in a sum (2)"),
    pytest.param(lambda m, x: m.g(m.b(m.f(x).relu())), {}, [Reason.UNCENTRED], id="a nonlinearity (2)"),
    pytest.param(lambda m, x: m.g(m.b(F.linear(x, x[0, :5]))), {}, [Reason.NOT_CONSTANT], id="a variable map (2)"),
    pytest.param(lambda m, x: m.g(m.b(F.max_pool1d(m.f(x).mT, 2).mT)), {}, [Reason.UNCENTRED], id="maxima (2)"),
    pytest.param(
        lambda m, x: m.g(m.b(F.pad(m.f(x), (0, 0, 1, 0), value=1.0))), {}, [Reason.UNCENTRED], id="padded with 1 (2)"
    ),
    pytest.param(
        lambda m, x: m.g(m.b(F.pad(m.k(x), (1, 1)))), {"k": nn.Linear(4, 3)}, [Reason.UNCENTRED], id="channels of 0 (2)"
    ),
    pytest.param(
        lambda m, x: m.g(m.b(m.f(x) + m.k(x))), {"k": nn.Linear(4, 1)}, [Reason.UNCENTRED], id="one for all (2)"
    ),
    pytest.param(
        lambda m, x: F.layer_norm(m.c(x.mT).mT, (6,)),
        {"c": nn.Conv1d(4, 6, 1, groups=2)},
        [Reason.UNCENTRED],
        id="a grouped convolution (2)",
    ),
    pytest.param(
        lambda m, x: F.layer_norm(m.c(x.mT).mT, (8,)),
        {"c": nn.Conv1d(4, 8, 3, groups=4)},
        [Reason.UNCENTRED],
        id="a depthwise convolution (2)",
    ),
    pytest.param(
        lambda m, x: m.b(m.c(x)),
        {"c": nn.Conv1d(16, 3, 1), "b": nn.LayerNorm(4, elementwise_affine=False)},
        [Reason.UNCENTRED],
        id="another axis (2)",
    ),
    pytest.param(
        lambda m, x: m.g(m.b(m.n(x @ m.e) + m.f(x))),
        {"e": nn.Parameter(torch.ones(4, 5))},
        [Reason.ONLINE, Reason.UNCENTRED],
        id="gamma (2)",
    ),
    pytest.param(lambda m, x: m.bert(x), {"bert": Bert()}, [Reason.ONLINE, Reason.UNCENTRED], id="post-norm (2)"),
    pytest.param(lambda m, x: m.s(x), {"s": Merging()}, [Reason.ONLINE, Reason.UNCENTRED], id="patch merging (1, 2)"),
    pytest.param(
        lambda m, x: m.s(x), {"s": Merging(joins=True)}, [Reason.ONLINE, Reason.UNCENTRED], id="so by cat (1, 2)"
    ),
    pytest.param(lambda m, x: m.s(x), {"s": Merging(embeds=False)}, [Reason.UNCENTRED], id="merging alone (1)"),
    pytest.param(
        lambda m, x: m.s(x), {"s": Merging(embeds=False, joins=True)}, [Reason.UNCENTRED], id="merging by cat (1)"
    ),
    pytest.param(
        lambda m, x: m.g(m.b(m.f(x) * m.t)),
        {"t": nn.Parameter(torch.ones(16, 1))},
        [Reason.UNCENTRED],
        id="a number per token (2)",
    ),
    pytest.param(lambda m, x: m.n(m.f(x)).relu(), {}, [Reason.ONLINE], id="beta (3)"),
]


@pytest.mark.parametrize(("function", "more", "reasons"), REFUSALS)
def test_refusals(function: Any, more: dict[str, Any], reasons: list[Reason]) -> None:
    model = randomized(Small(function, **{**parts(), **more})).double()
    graph = ready(model, x := sample(*TOKENS))
    before = graph.text()
    report = RecentreStream().run(graph)
    assert sorted(refusal.reason.name for refusal in report.refused) == sorted(reason.name for reason in reasons)
    assert len(report.refused) == count(graph, ops.LAYER_NORM)
    assert graph.text() == before
    assert distance(graph.run(x), outputs(model, x)) < EXACT
