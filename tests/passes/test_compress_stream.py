"""A centred stream computed with one channel less is the same model, or stays for a documented reason (methods 4.2)."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normfuse.export.onnx import export_onnx
from normfuse.folding import FoldOptions, fold
from normfuse.graph import Graph, capture, ops, query
from normfuse.nn import CRMSNorm, expand_channels
from normfuse.passes.compress_stream import CompressStream, without_last_input, without_last_output
from normfuse.passes.presets import AFFINES, CANONICAL, LOWER, LayerNorms, folds
from normfuse.pipeline import Pipeline
from normfuse.report import Reason
from normfuse.rewrite.linear_map import LinearMap
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
    Pipeline(phases=(CANONICAL, AFFINES, folds(layer_norms=LayerNorms.RMS))).run(graph)
    return graph


def norms(graph: Graph) -> int:
    return sum(query.is_call(node, ops.RMS_NORM) for node in graph.nodes)


class Block(nn.Module):
    """Attention of two heads and an MLP behind layer norms, with layer scales if asked for."""

    def __init__(self, width: int, *, heads: int = 2, layer_scale: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.heads, inner = heads, 4 * heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-3)
        self.qkv, self.proj = nn.Linear(width, 3 * inner, bias=bias), nn.Linear(inner, width, bias=bias)
        self.first, self.last = nn.Linear(width, 11), nn.Linear(11, width, bias=bias)
        self.scales = nn.Parameter(torch.ones(2, width)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, 4)).permute(2, 0, 3, 1, 4)
        y = self.proj(F.scaled_dot_product_attention(*split.unbind()).transpose(1, 2).flatten(2))
        x = x + (y if self.scales is None else y * self.scales[0])
        z = self.last(F.gelu(self.first(self.norm2(x))))
        result: Tensor = x + (z if self.scales is None else self.scales[1] * z)
        return result


class ViT(nn.Module):
    """Patches, a class token, a position table, pre-norm blocks, a head that reads the class token or the mean."""

    def __init__(self, width: int = 7, *, blocks: int = 2, pools: bool = False, **options: Any) -> None:
        super().__init__()
        self.patch, self.pools = nn.Conv2d(3, width, 2, 2), pools
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 7, width))
        self.blocks = nn.Sequential(*(Block(width, **options) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions)
        x = self.norm(x.mean(1)) if self.pools else self.norm(x)[:, 0]
        result: Tensor = self.head(x)
        return result


class Conv(nn.Module):
    """A channels-first stream (ConvNeXt): the norm reads it turned, convolutions read the norm, one steps down."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.norm, self.last = nn.Conv2d(3, width, 1), nn.LayerNorm(width), nn.LayerNorm(5)
        self.wide, self.narrow = nn.Conv2d(width, 4, 3, padding=1), nn.Conv2d(4, width, 1)
        self.up, self.down = nn.ConvTranspose2d(width, 5, 2, stride=2), nn.Conv2d(width, 5, 2, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.avg_pool2d(x + self.narrow(torch.tanh(self.wide(y))), 2, padding=1)
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        down = self.last(self.down(y).flatten(2).transpose(1, 2))
        return self.head(down), self.up(y).sin()


class Words(nn.Module):
    """An embedding and a table of positions, tied to the head."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, width), nn.Embedding(6, width)
        self.block, self.norm = Block(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.norm(self.block(y)), self.words.weight)


def pre(width: int = 5) -> dict[str, Any]:
    return {"f": nn.Linear(4, width), "n": nn.LayerNorm(width), "g": nn.Linear(width, 3), "h": nn.Linear(3, width)}


def image(x: int = 2) -> Tensor:
    return sample(x, 3, 4, 6)


def test_picture(golden: Golden) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.c.expand(x.shape[0], -1, -1), m.f(x)], 1) + m.p
        y = y + m.h(torch.tanh(m.g(m.n(y))))
        result: Tensor = m.g(m.n(y).select(1, 0).reshape(-1, 5))
        return result

    parts = {"c": nn.Parameter(torch.ones(1, 1, 5)), "p": nn.Parameter(torch.ones(7, 5))}
    graph = ready(randomized(Small(function, **pre(), **parts)), sample(2, 6, 4).float())
    before = graph.text()
    report = CompressStream().run(graph)
    assert report.applied == {"stream-loses-channel": 1}
    assert {"f", "g", "h", "expand", "add_8"} == set(report.sites[0]["into"].split(", "))
    assert picture(before, graph.text()) == golden


MODELS: dict[str, Any] = {
    "class token": (ViT, image),
    "mean of the tokens": (lambda: ViT(pools=True), image),
    "layer scale": (lambda: ViT(layer_scale=True), image),
    "as many channels as tokens and samples": (lambda: ViT(blocks=1), lambda: image(7)),
    "two channels": (lambda: ViT(2), image),
    "without bias": (lambda: ViT(bias=False), image),
    "convolutions": (Conv, lambda: sample(2, 3, 5, 7)),
    "embeddings, a tied head": (Words, lambda: torch.randint(0, 13, (2, 6), generator=seeded(2))),
}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_contract(name: str) -> None:
    make, given = MODELS[name]
    model, x = randomized(make()).double(), given()
    expected = outputs(model, x)
    graph = ready(model, x)
    assert norms(graph) > 0
    assert distance(graph.run(x), expected) < EXACT
    assert check_pass_contract(CompressStream(), graph, (x,)).refused == ()
    CompressStream().run(graph)
    assert norms(graph) == 0
    assert distance(graph.run(x), expected) < EXACT
    assert distance(graph.run(x[:1]), outputs(model, x[:1])) < EXACT


@pytest.mark.parametrize("seed", [1, 2])
def test_float32_differs_by_rounding(seed: int) -> None:
    model, x = randomized(ViT(layer_scale=True), seed=seed), image().float()
    graph = ready(model, x)
    tolerance = fold_tolerance(graph, x)
    CompressStream().run(graph)
    (found,), (expected,) = graph.run(x), outputs(model, x)
    assert float((found - expected).abs().max()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_squared_in_float32(dtype: torch.dtype) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.g(m.n(m.f(x)))
        return result

    model, x = randomized(Small(function, **pre())), sample(3, 4) * 300  # the squares go beyond 65504
    expected = outputs(model.double(), x)
    graph = ready(model.to(dtype), x.to(dtype))
    CompressStream().run(graph)
    (found,) = graph.run(x.to(dtype))
    assert norms(graph) == 0
    assert found.dtype == dtype
    # One rounding of x, f's weight, f(x), the norm, g's weight and its sum, each of the largest term that is added up.
    largest = max(float(p.detach().abs().sum(-1).max()) for p in (model.g.weight, model.f.weight)) * 5**0.5
    assert float((found.double() - expected[0]).abs().max()) < 6 * torch.finfo(dtype).eps * 5**0.5 * largest


def test_round_trip() -> None:
    """T6: with its last channel every tensor of the stream is the centred one, and the norms are CRMSNorm."""
    model, x = randomized(ViT(layer_scale=True)).double(), image()
    whole = ready(model, x)
    shorter = whole.copy()
    CompressStream().run(shorter)
    expected, found = values(whole, x), values(shorter, x)
    stream = [name for name, value in expected.items() if name in found and found[name].shape != value.shape]
    assert len(stream) > 10
    for name in stream:
        axis = 1 if expected[name].shape[1] == 7 and expected[name].shape[-1] != 7 else -1
        if found[name].shape[axis] != 6:  # the patches, channels first
            axis = next(i for i, size in enumerate(found[name].shape) if size == 6 != expected[name].shape[i])
        ours = expand_channels(found[name].movedim(axis, -1)).movedim(-1, axis)
        torch.testing.assert_close(ours, expected[name], rtol=0, atol=EXACT)
    for node in whole.nodes:
        if query.is_call(node, ops.RMS_NORM):
            z = found[node.args[0].name]  # type: ignore[union-attr]
            torch.testing.assert_close(
                expand_channels(CRMSNorm(7, eps=float(node.args[3]))(z)),  # type: ignore[arg-type]
                expected[node.name],
                rtol=0,
                atol=EXACT,
            )


def values(graph: Graph, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            found[node.name] = value
        return value

    graph.run_watched((x,), watch)
    return found


@pytest.mark.parametrize("reader", ["g", "f"])
def test_both_changes_are_needed(reader: str) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.g(m.b(m.f(x)))
        return result

    model, x = randomized(Small(function, **pre(), b=nn.LayerNorm(5, elementwise_affine=False))).double(), sample(3, 4)
    graph = ready(model, x)
    centred = dict(graph.module.named_buffers())[f"{reader}.weight"].clone()
    CompressStream().run(graph)
    weight = dict(graph.module.named_buffers())[f"{reader}.weight"]
    weight.copy_(centred[:, :-1] if reader == "g" else centred[1:])
    assert distance(graph.run(x), outputs(model, x)) > WRONG


@pytest.mark.parametrize("kind", ["linear", "convolution", "transposed"])
def test_maps_without_a_channel(kind: str) -> None:
    shape = {"linear": (3, 5), "convolution": (3, 5, 2), "transposed": (5, 3, 2)}[kind]
    function: Any = {"linear": F.linear, "convolution": F.conv1d, "transposed": F.conv_transpose1d}[kind]
    linear = LinearMap(sample(*shape), sample(3), 1, 1, is_transposed=kind == "transposed")
    x = sample(2, 5, 7) if len(shape) == 3 else sample(2, 5)
    x = x - x.mean(1, keepdim=True)
    whole = function(x, linear.weight, linear.bias)
    shorter = without_last_input(linear)
    torch.testing.assert_close(function(x[:, :-1], shorter.weight, shorter.bias), whole)
    fewer = without_last_output(linear)
    torch.testing.assert_close(function(x, fewer.weight, fewer.bias), whole[:, :-1])


def test_bare_norms_may_write_their_stream() -> None:
    """Post-norm without gamma: the norm's output is centred, and goes on as stream."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.f(x))
        result: Tensor = m.g(m.b((y + m.p) * 0.5 - m.q + y))
        return result

    bare = nn.LayerNorm(5, elementwise_affine=False)
    parts = {"p": nn.Parameter(torch.ones(5)), "q": nn.Parameter(torch.ones(6, 5))}
    model = randomized(Small(function, **pre(), b=bare, **parts)).double()
    graph = ready(model, x := sample(2, 6, 4))
    assert norms(graph) == 2
    assert "affine" in graph.text()
    assert check_pass_contract(CompressStream(), graph, (x,)).refused == ()
    CompressStream().run(graph)
    assert norms(graph) == 0
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_one_stream_stays_the_other_does_not() -> None:
    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.n2(m.f2(x))
        return m.g(m.n(m.f(x))), m.g2(y) + y.sin().mean(-1, keepdim=True)

    second = {"f2": nn.Linear(4, 6), "n2": nn.LayerNorm(6, elementwise_affine=False), "g2": nn.Linear(6, 3)}
    model = randomized(Small(function, **pre(), **second)).double()
    graph = ready(model, x := sample(2, 4))
    report = CompressStream().run(graph)
    assert report.applied == {"stream-loses-channel": 1}
    assert {(refusal.reason, refusal.layer) for refusal in report.refused} == {(Reason.EVERY_CHANNEL, "n2")}
    assert distance(graph.run(x), outputs(model, x)) < EXACT


REFUSALS = [
    pytest.param(
        lambda m, x: m.g(m.r(m.f(x))), {"r": nn.RMSNorm(5, eps=1e-3)}, Reason.UNCENTRED, id="never centred (1)"
    ),
    pytest.param(lambda m, x: m.a(m.r(x)), {"r": nn.RMSNorm(4), "a": nn.Linear(4, 3)}, Reason.MODEL_INPUT, id="x (1)"),
    pytest.param(lambda m, x: m.g(m.b(m.f(x)) + m.h(m.g(m.f(x)))), {}, Reason.UNCENTRED, id="behind a norm (1)"),
    pytest.param(lambda m, x: m.g(m.b(m.f(x)) + m.p), {"p": torch.ones(7, 5)}, Reason.UNCENTRED, id="a constant (1)"),
    pytest.param(lambda m, x: m.g(m.b(y := m.f(x))) + m.n(y).sin().mean(), {}, Reason.EVERY_CHANNEL, id="gamma (2)"),
    pytest.param(lambda m, x: m.b(m.f(x)), {}, Reason.GRAPH_OUTPUT, id="an output (2)"),
    pytest.param(lambda m, x: m.g(y := m.b(m.f(x))) + y.sin().sum(), {}, Reason.EVERY_CHANNEL, id="a sine (2)"),
    pytest.param(
        lambda m, x: F.linear(y := m.b(m.f(x)), y[0, :3].tanh()), {}, Reason.NOT_CONSTANT, id="a variable map (2)"
    ),
    pytest.param(
        lambda m, x: m.c(m.b(m.f(x)).transpose(1, 2)),
        {"f": nn.Linear(4, 6), "b": nn.LayerNorm(6, elementwise_affine=False), "c": nn.Conv1d(6, 4, 1, groups=2)},
        Reason.EVERY_CHANNEL,
        id="groups (2)",
    ),
    pytest.param(
        lambda m, x: m.c(F.max_pool1d(m.b(m.f(x)).transpose(1, 2), 2)),
        {"c": nn.Conv1d(5, 4, 1)},
        Reason.EVERY_CHANNEL,
        id="maxima (2)",
    ),
    pytest.param(
        lambda m, x: m.g(F.pad(m.b(m.f(x)), (0, 0, 1, 0), value=1.0)), {}, Reason.EVERY_CHANNEL, id="padded with 1 (2)"
    ),
    pytest.param(
        lambda m, x: m.c(torch.cat([m.b(m.f(x)), m.b(m.f(x))], -1)),
        {"c": nn.Linear(10, 3)},
        Reason.EVERY_CHANNEL,
        id="joined channels (3)",
    ),
    pytest.param(
        lambda m, x: m.c(m.b(m.f(x)).flatten(1)), {"c": nn.Linear(35, 3)}, Reason.EVERY_CHANNEL, id="flattened (3)"
    ),
    pytest.param(
        lambda m, x: m.c(m.b(m.f(x)).unflatten(-1, (3, 2))),
        {"f": nn.Linear(4, 6), "b": nn.LayerNorm(6, elementwise_affine=False), "c": nn.Linear(2, 3)},
        Reason.EVERY_CHANNEL,
        id="heads (3)",
    ),
    pytest.param(lambda m, x: m.g(m.b(m.f(x)).flip(-1)), {}, Reason.EVERY_CHANNEL, id="turned around (3)"),
    pytest.param(lambda m, x: m.g(m.b(m.f(x)).roll(5, -1)), {}, Reason.EVERY_CHANNEL, id="rolled once around (3)"),
    pytest.param(
        lambda m, x: m.g(m.b(m.f(x)).index_select(-1, m.i)),
        {"i": torch.arange(5)},
        Reason.EVERY_CHANNEL,
        id="all selected (3)",
    ),
    pytest.param(
        lambda m, x: m.c(m.b(m.o(x))),
        {"o": nn.Linear(4, 1), "b": nn.LayerNorm(1, elementwise_affine=False), "c": nn.Linear(1, 3)},
        Reason.EVERY_CHANNEL,
        id="one channel",
    ),
]


@pytest.mark.parametrize(("function", "parts", "reason"), REFUSALS)
def test_refusals(function: Any, parts: dict[str, Any], reason: Reason) -> None:
    bare = nn.LayerNorm(5, elementwise_affine=False)
    model = randomized(Small(function, **{**pre(), "b": bare, **parts})).double()
    graph = ready(model, x := sample(2, 7, 4))
    assert norms(graph) > 0
    before = graph.text()
    report = CompressStream().run(graph)
    assert {refusal.reason for refusal in report.refused} == {reason}
    assert len(report.refused) == norms(graph)
    assert graph.text() == before
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_a_map_that_does_not_fit_stays() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.g(m.b(m.f(x)))
        return result

    model: Any = randomized(Small(function, **pre(), b=nn.LayerNorm(5, elementwise_affine=False)))
    with torch.no_grad():
        model.g.weight[:, -1], model.g.weight[:, 0] = -4e4, 4e4
    graph = ready(model.half(), sample(2, 4).half())
    assert [refusal.reason for refusal in CompressStream().run(graph).refused] == [Reason.OVERFLOW]


@pytest.mark.slow
def test_fold_certifies_it_and_onnxruntime_runs_it(tmp_path: Path) -> None:
    model, x = randomized(ViT(layer_scale=True)), image().float()
    folded = fold(model, [x], options=FoldOptions(layer_norms=LayerNorms.CRMS))
    assert folded.holds
    assert folded.certificate["norms"] == {"before": {"layer_norm": 5}, "after": {"crms_norm": 5}}
    assert [site["rule"] for site in folded.certificate["sites"]][-1] == "stream-loses-channel"
    torch.testing.assert_close(folded.module(x), model(x))
    export_onnx(folded.graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


def test_the_preset_centres_first() -> None:
    model, x = randomized(ViT()).double(), image()
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, AFFINES, folds(layer_norms=LayerNorms.CRMS), LOWER)).run(graph)
    assert norms(graph) == 0
    assert distance(graph.run(x), outputs(model, x)) < EXACT
    assert norms(ready(model, x)) == 5
