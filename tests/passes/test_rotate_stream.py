"""A turned stream is the same model without channels that stand out, or stays for a documented reason (methods 12)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.nn import PRepBN, UnifiedNorm
from normfuse.passes.compress_stream import CompressStream
from normfuse.passes.presets import AFFINES, CANONICAL, LayerNorms, folds
from normfuse.passes.rotate_stream import RotateStream
from normfuse.pipeline import Pipeline
from normfuse.report import Reason
from normfuse.rewrite.hadamard import rotation
from normfuse.rewrite.linear_map import LinearMap
from normfuse.rewrite.rotation import rotate_inputs, rotate_outputs, turn
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

EXACT = 1e-12
WRONG = 1e-3
Norm = Callable[[int], nn.Module]


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, AFFINES, folds(layer_norms=LayerNorms.RMS))).run(graph)
    return graph


def prepbn(width: int) -> nn.Module:
    return PRepBN(width, total_step=0)


class Block(nn.Module):
    """Attention of two heads and an MLP; the norms stand before them or behind the sums."""

    def __init__(self, width: int, norm: Norm, *, is_post_norm: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.is_post_norm = norm(width), norm(width), is_post_norm
        self.qkv, self.proj = nn.Linear(width, 24), nn.Linear(8, width)
        self.first, self.last = nn.Linear(width, 11), nn.Linear(11, width)
        self.scale = nn.Parameter(torch.ones(width))

    def attend(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        result: Tensor = self.proj(F.scaled_dot_product_attention(*split.unbind()).transpose(1, 2).flatten(2))
        return result * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.is_post_norm:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.last(F.gelu(self.first(x))))  # type: ignore[no-any-return]
        x = x + self.attend(self.norm1(x))
        result: Tensor = x + self.last(F.gelu(self.first(self.norm2(x))))
        return result


class ViT(nn.Module):
    """Patches, a class token, positions, blocks with layer scale, a head on the class token or the mean."""

    def __init__(self, norm: Norm, width: int = 12, *, is_post_norm: bool = False, pools: bool = False) -> None:
        super().__init__()
        self.patch, self.pools = nn.Conv2d(3, width, 2, 2), pools
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 7, width))
        self.blocks = nn.Sequential(*(Block(width, norm, is_post_norm=is_post_norm) for _ in range(2)))
        self.norm, self.head = nn.Identity() if is_post_norm else norm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions)
        x = self.norm(x.mean(1)) if self.pools else self.norm(x)[:, 0]
        result: Tensor = self.head(x)
        return result


class Merging(nn.Module):
    """Two streams; four neighbours of the first, side by side, are read into the second (Swin)."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.patch, self.narrow, self.wide = nn.Conv2d(3, 8, 1), Block(8, norm), Block(20, norm)
        self.norm, self.reduction = norm(32), nn.Linear(32, 20)
        self.last, self.head = norm(20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.patch(x).flatten(2).transpose(1, 2)).unflatten(1, (4, 6)).roll((1, 2), (1, 2))
        corners = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        x = self.wide(self.reduction(self.norm(torch.cat(corners, -1))).flatten(1, 2))
        result: Tensor = self.head(self.last(x).mean(1))
        return result


class Conv(nn.Module):
    """A channels-first stream without nonlinearity on it; one map both reads and writes it."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.ones(1, 1, 5, 7))
        self.stem, self.again = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.wide, self.narrow = nn.Conv2d(width, 4, 3, padding=1), nn.Conv2d(4, width, 1)
        self.up, self.down = nn.ConvTranspose2d(width, 5, 2, stride=2), nn.Conv2d(width, 5, 2, padding=1)
        self.down2 = nn.ConvTranspose2d(5, width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x) + self.places
        x = F.avg_pool2d(x + 0.5 * self.narrow(torch.tanh(self.wide(x))) + 0.25, 2, padding=1)
        x = F.pad(x + self.again(x), (1, 0, 0, 1))
        y = self.down2(torch.tanh(self.down(x)))
        x = F.interpolate(x, y.shape[-2:]) - y
        return self.up(x).sin(), self.down(x)


class Words(nn.Module):
    """An embedding and a table of positions, tied to the head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, width), nn.Embedding(6, width)
        self.block, self.norm = Block(width, nn.LayerNorm), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.norm(self.block(y)), self.words.weight)


def image(x: int = 2) -> Tensor:
    return sample(x, 3, 4, 6)


def tokens() -> Tensor:
    return torch.randint(0, 13, (2, 6), generator=seeded(2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "layer norm": (lambda: ViT(nn.LayerNorm), image, 1),
    "layer norm, mean of the tokens": (lambda: ViT(nn.LayerNorm, pools=True), image, 1),
    "rms norm": (lambda: ViT(nn.RMSNorm), image, 1),
    "unified norm": (lambda: ViT(UnifiedNorm), image, 1),
    "prepbn": (lambda: ViT(prepbn), image, 1),
    "a width without Hadamard matrix": (lambda: ViT(nn.LayerNorm, 9), image, 1),
    "as many channels as samples and tokens": (lambda: ViT(nn.LayerNorm, 8), lambda: image(8), 1),
    "patch merging": (lambda: Merging(prepbn), image, 2),
    "patch merging, rms norm": (lambda: Merging(nn.RMSNorm), image, 2),
    "convolutions": (Conv, lambda: sample(2, 3, 5, 7), 1),
    "embeddings, a tied head": (Words, tokens, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_contract(name: str) -> None:
    make, given, streams = MODELS[name]
    model, x = randomized(make()).double(), given()
    graph = ready(model, x)
    folded = graph.run(x)
    before = dict(graph.module.named_buffers())
    report = check_pass_contract(RotateStream(seed=1), graph, (x,)) if "tied" not in name else None
    report = report or RotateStream(seed=1).run(graph.copy())
    assert report.applied == {"stream-turns": streams}
    assert report.refused == ()
    RotateStream(seed=1).run(graph)
    assert distance(graph.run(x), folded) < EXACT
    assert distance(graph.run(x), outputs(model, x)) < 1e-10  # the folds of nearly dead channels included
    assert distance(graph.run(x[:1]), outputs(model, x[:1])) < 1e-10
    after = dict(graph.module.named_buffers())
    assert any(not torch.equal(after[path], before[path]) for path in after.keys() & before.keys())


def post_norm(smallest: float) -> nn.Module:
    """Return a post-norm ViT with unified norms whose gammas and variances are at least ``smallest``."""
    model = randomized(ViT(UnifiedNorm, is_post_norm=True)).double()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name and (name.endswith(("weight", "running_var"))):
                tensor.abs_().clamp_min_(smallest)
    return model


def test_post_norm_turns_where_its_channels_are_of_one_kind() -> None:
    graph, x = ready(model := post_norm(0.3), image()), image()
    assert check_pass_contract(RotateStream(), graph, (x,)).applied == {"stream-turns": 1}
    RotateStream().run(graph)
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_post_norm_with_dead_channels_stays() -> None:
    """Behind four norms a dead channel is 1e10 times the others: to mix them would leave nothing of it."""
    graph, x = ready(model := post_norm(0.0), image()), image()
    assert [refusal.reason for refusal in RotateStream().run(graph).refused] == [Reason.RANGE]
    assert distance(graph.run(x), outputs(model, x)) < 1e-8


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("norm", [nn.LayerNorm, UnifiedNorm])
def test_float32_differs_by_rounding(norm: Norm, seed: int) -> None:
    model, x = randomized(ViT(norm), seed=seed), image().float()
    graph = ready(model, x)
    tolerance = fold_tolerance(graph, x)
    RotateStream().run(graph)
    (found,), (expected,) = graph.run(x), outputs(model, x)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < tolerance


def test_dead_and_huge_channels() -> None:
    model, x = randomized(ViT(nn.LayerNorm)).double(), image()
    with torch.no_grad():
        for linear in (model.patch, *(part for block in model.blocks for part in (block.proj, block.last))):  # type: ignore[union-attr]
            linear.weight[3], linear.bias[3] = 0.0, 0.0  # type: ignore[index, operator, union-attr]
            linear.weight[5] *= 1e6  # type: ignore[index, operator, union-attr]
        model.positions[..., 3] = model.cls[..., 3] = 0.0
    graph = ready(model, x)
    folded = graph.run(x)
    RotateStream().run(graph)
    assert distance(graph.run(x), folded) < EXACT
    assert distance(graph.run(x), outputs(model, x)) < 1e-8  # of 1e6, float64 keeps ten digits


def test_picture(golden: Golden) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.c.expand(x.shape[0], -1, -1), m.f(x)], 1) + m.p
        y = y + m.h(torch.tanh(m.g(m.n(y))))
        result: Tensor = m.g(m.n(y).select(1, 0).reshape(-1, 12))
        return result

    parts = {"c": nn.Parameter(torch.ones(1, 1, 12)), "p": nn.Parameter(torch.ones(7, 12))}
    graph = ready(randomized(Small(function, **stream(), **parts)), sample(2, 6, 4).float())
    before = graph.text()
    report = RotateStream().run(graph)
    assert report.applied == {"stream-turns": 1}
    assert report.sites[0]["affine"] == "12 channels"
    assert {"f", "g", "h"} < set(report.sites[0]["into"].split(", "))
    assert picture(before, graph.text()) == golden


def stream(width: int = 12) -> dict[str, Any]:
    maps = {"f": nn.Linear(4, width), "g": nn.Linear(width, 3), "h": nn.Linear(3, width), "k": nn.Linear(4, width)}
    return {**maps, "n": nn.LayerNorm(width)}


def twice(m: Any, x: Tensor) -> Tensor:
    """Return a sum of two linear maps that cannot become one."""
    result: Tensor = m.f(x) + m.k(x.tanh())
    return result


REFUSALS = [
    pytest.param(lambda m, x: m.g(twice(m, x)), {}, stream(7), Reason.TOO_SMALL, id="seven channels (1)"),
    pytest.param(lambda m, x: m.g(m.f(x) + m.k(x.tanh()).sin()), {}, None, Reason.NO_LINEAR, id="a sine writes (2)"),
    pytest.param(lambda m, x: m.t(m.t(x) + x), {"t": nn.Linear(12, 12)}, None, Reason.MODEL_INPUT, id="x writes (2)"),
    pytest.param(
        lambda m, x: m.g(m.f(x) + m.c(x.transpose(1, 2)).transpose(1, 2)),
        {"c": nn.Conv1d(4, 12, 1, groups=2)},
        None,
        Reason.APART,
        id="groups write (2)",
    ),
    pytest.param(lambda m, x: m.g(F.relu(twice(m, x))), {}, None, Reason.NONLINEAR_READER, id="relu (3)"),
    pytest.param(lambda m, x: m.g(twice(m, x).softmax(-1)), {}, None, Reason.NONLINEAR_READER, id="softmax (3)"),
    pytest.param(
        lambda m, x: m.c(F.max_pool1d(twice(m, x).transpose(1, 2), 2)),
        {"c": nn.Conv1d(12, 3, 1)},
        None,
        Reason.NONLINEAR_READER,
        id="maxima (3)",
    ),
    pytest.param(
        lambda m, x: m.c(twice(m, x).transpose(1, 2)),
        {"c": nn.Conv1d(12, 4, 1, groups=4)},
        None,
        Reason.APART,
        id="groups read (3)",
    ),
    pytest.param(twice, {}, None, Reason.GRAPH_OUTPUT, id="an output (3)"),
    pytest.param(
        lambda m, x: m.g(F.pad(twice(m, x), (0, 0, 1, 0), value=1.0)),
        {},
        None,
        Reason.PADDED_VALUE,
        id="ones (3)",
    ),
    pytest.param(
        lambda m, x: F.linear(y := twice(m, x), y[0, :3].tanh()),
        {},
        None,
        Reason.NOT_CONSTANT,
        id="no map (3)",
    ),
    pytest.param(
        lambda m, x: m.s(twice(m, x).transpose(1, 2)),
        {"s": nn.Linear(7, 3)},
        None,
        Reason.AXIS,
        id="tokens (3)",
    ),
    pytest.param(lambda m, x: m.g(twice(m, x).flip(-1)), {}, None, Reason.APART, id="turned around (4)"),
    pytest.param(lambda m, x: m.g(twice(m, x).roll(1, -1)), {}, None, Reason.APART, id="rolled (4)"),
    pytest.param(lambda m, x: m.s(twice(m, x)[..., :5]), {"s": nn.Linear(5, 3)}, None, Reason.APART, id="some (4)"),
    pytest.param(
        lambda m, x: m.s(twice(m, x).unflatten(-1, (3, 4))),
        {"s": nn.Linear(4, 3)},
        None,
        Reason.APART,
        id="cut (4)",
    ),
    pytest.param(
        lambda m, x: m.s(torch.cat([twice(m, x), x], -1)),
        {"s": nn.Linear(16, 3)},
        None,
        Reason.APART,
        id="beside (4)",
    ),
    pytest.param(lambda m, x: m.g(m.n(m.f(x) + m.k(x.tanh()).sin())), {}, None, Reason.ONLINE, id="layer norm (5)"),
    pytest.param(
        lambda m, x: (m.g(y := m.r(twice(m, x))), y.sin()),
        {"r": nn.RMSNorm(12)},
        None,
        Reason.CHANNEL_SCALE,
        id="gamma (5)",
    ),
    pytest.param(
        lambda m, x: (m.g(y := twice(m, x)), F.relu(y * m.s)),
        {"s": torch.rand(12)},
        None,
        Reason.CHANNEL_SCALE,
        id="scale (5)",
    ),
]


@pytest.mark.parametrize(("function", "parts", "base", "reason"), REFUSALS)
def test_refusals(function: Any, parts: dict[str, Any], base: dict[str, Any] | None, reason: Reason) -> None:
    model = randomized(Small(function, **{**(base or stream()), **parts})).double()
    graph = ready(model, x := sample(2, 7, 12 if "t" in parts else 4))
    before = graph.text()
    report = RotateStream().run(graph)
    assert [refusal.reason for refusal in report.refused] == [reason]
    assert graph.text() == before
    assert distance(graph.run(x), outputs(model, x)) < 1e-10


class Residual(nn.Module):
    """A residual network: ReLU stands on every sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.first, self.second, self.head = nn.Conv2d(12, 12, 3), nn.Conv2d(12, 12, 3, padding=2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        pytest.param(Residual, [Reason.NONLINEAR_READER], id="relu on the sums"),
        pytest.param(lambda: Merging(nn.LayerNorm), [Reason.ONLINE], id="layer norm of joined vectors"),
    ],
)
def test_whole_models_that_stay(make: Callable[[], nn.Module], reasons: list[Reason]) -> None:
    model, x = randomized(make()).double(), image()
    graph = ready(model, x)
    report = RotateStream().run(graph)
    assert [refusal.reason for refusal in report.refused] == reasons
    assert report.applied == ({} if make is Residual else {"stream-turns": 1})  # the stream behind the merging
    assert distance(graph.run(x), outputs(model, x)) < 1e-10


def test_a_map_that_does_not_fit_stays() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.g(twice(m, x))
        return result

    model: Any = randomized(Small(function, **stream()))
    with torch.no_grad():
        model.g.weight.fill_(6e4)
    graph = ready(model.half(), sample(2, 4).half())
    assert [refusal.reason for refusal in RotateStream().run(graph).refused] == [Reason.OVERFLOW]


def test_a_turned_stream_is_centred_no_longer() -> None:
    model, x = randomized(ViT(nn.LayerNorm)).double(), image()
    graph = ready(model, x)
    RotateStream().run(graph)
    assert CompressStream().run(graph).applied == {}


@pytest.mark.parametrize("side", ["writer", "reader"])
def test_both_changes_are_needed(side: str) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.g(twice(m, x))
        return result

    model, x = randomized(Small(function, **stream())).double(), sample(3, 4)
    graph, path = ready(model, x), "f.weight" if side == "writer" else "g.weight"
    kept = dict(graph.module.named_buffers())[path].clone()
    RotateStream().run(graph)
    dict(graph.module.named_buffers())[path].copy_(kept)
    assert distance(graph.run(x), outputs(model, x)) > WRONG


@pytest.mark.parametrize("kind", ["linear", "convolution", "transposed"])
def test_turned_maps(kind: str) -> None:
    shape = {"linear": (8, 12), "convolution": (8, 12, 2), "transposed": (12, 8, 2)}[kind]
    function: Any = {"linear": F.linear, "convolution": F.conv1d, "transposed": F.conv_transpose1d}[kind]
    linear = LinearMap(sample(*shape), sample(8), 1, 1, is_transposed=kind == "transposed")
    x = sample(2, 12, 7) if len(shape) == 3 else sample(2, 12)
    whole = function(x, linear.weight, linear.bias)
    inner, outer = rotate_inputs(linear, rotation(4, 1)), rotate_outputs(linear, rotation(8, 2))
    torch.testing.assert_close(function(turn(x, rotation(4, 1), 1), inner.weight, inner.bias), whole)
    torch.testing.assert_close(function(x, outer.weight, outer.bias), turn(whole, rotation(8, 2), 1))


def test_no_channel_stands_out_and_four_bits_hold_more() -> None:
    """The point of it: one huge channel decides the only scale of a tensor, turned it decides nothing."""
    model, x = randomized(ViT(nn.LayerNorm, 48)).double(), image(4)
    with torch.no_grad():
        model.positions[..., 5] += 60.0
    graph = ready(model, x)
    before = stream_of(graph, x)
    RotateStream().run(graph)
    after = stream_of(graph, x)
    assert stands_out(after) < stands_out(before) / 2
    assert kurtosis(after) < kurtosis(before) / 5
    assert four_bit_error(after) < four_bit_error(before) / 2


def stream_of(graph: Graph, x: Tensor) -> Tensor:
    found: list[Tensor] = []

    def watch(node: Any, value: Any) -> Any:
        found.extend([value] if query.is_call(node, ops.RMS_NORM) else [])
        return value

    graph.run_watched((x,), watch)
    return found[0]


def stands_out(x: Tensor) -> float:
    return float(x.abs().max() / x.square().mean().sqrt())


def kurtosis(x: Tensor) -> float:
    return float(x.pow(4).mean() / x.square().mean() ** 2)


def four_bit_error(x: Tensor) -> float:
    step = x.abs().max() / 7
    return float(((x / step).round() * step - x).square().mean().sqrt())
