"""No affine is left, nothing superfluous is written, layer norm gets its gamma and beta back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.lower_affines import LowerAffines
from normfuse.passes.presets import CANONICAL
from normfuse.pipeline import Phase, Pipeline
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, seeded


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(9)).to(dtype)


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, Phase("norms", (FindAffines(),)))).run(graph)
    return graph


def calls(graph: Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def model() -> nn.Module:
    parts: dict[str, nn.Module | Tensor] = {"ln": nn.LayerNorm(5), "bn": nn.BatchNorm1d(7), "s": torch.ones(5)}
    return randomized(Small(lambda m, x: m.bn(m.ln(x).relu()).relu() * (m.s * 3) + 2, **parts))


def test_picture(golden: Golden) -> None:
    graph = ready(model(), sample(3, 7, 5, dtype=torch.float32))
    before = graph.text()
    report = LowerAffines().run(graph)
    assert report.applied == {"affine-into-norm": 1, "affine-is-arithmetic": 2}
    assert picture(before, graph.text()) == golden


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_and_contract(dtype: torch.dtype) -> None:
    x = sample(3, 7, 5, dtype=dtype)
    graph = ready(model().to(dtype), x)
    expected = graph.run(x)
    assert check_pass_contract(LowerAffines(), graph, (x,)).changed
    LowerAffines().run(graph)
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)
    # The layer norm multiplies inside, in float32 for half precision: a rounding or two of the largest value.
    assert distance(graph.run(x), expected) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda m, x: x.relu() * 1.0 + 0.0, [ops.RELU], id="nothing"),
        pytest.param(lambda m, x: x.relu() * 2.0, [ops.RELU, ops.MUL], id="a scale"),
        pytest.param(lambda m, x: x.relu() - 2.0, [ops.RELU, ops.ADD], id="a shift"),
        pytest.param(lambda m, x: 2.0 - x.relu() * 3, [ops.RELU, ops.MUL, ops.ADD], id="both"),
    ],
)
def test_what_is_neutral_is_left_out(function: Any, expected: list[object]) -> None:
    graph = ready(Small(function), x := sample(4, 5))
    LowerAffines().run(graph)
    assert calls(graph) == expected
    assert distance(graph.run(x), [function(None, x)]) < 1e-15


@pytest.mark.parametrize(
    ("function", "shape", "takes"),
    [
        pytest.param(
            lambda m, x: ((y := nn.functional.layer_norm(x, (5,))), y * m.s), (4, 7, 5), False, id="read twice (1)"
        ),
        pytest.param(lambda m, x: m.ln(x) * m.s, (4, 7, 5), True, id="gamma there already: one affine (1)"),
        pytest.param(lambda m, x: nn.functional.layer_norm(x, (7, 5)) * m.s, (4, 7, 5), False, id="over two axes (1)"),
        pytest.param(
            lambda m, x: nn.functional.layer_norm(x, (5,)) * m.s[:, None], (4, 5, 5), False, id="other axis (1)"
        ),
        pytest.param(lambda m, x: nn.functional.layer_norm(x, (5,)) * 3.0, (4, 7, 5), False, id="uniform (1)"),
    ],
)
def test_what_the_layer_norm_takes(function: Any, shape: tuple[int, ...], takes: bool) -> None:
    parts: dict[str, nn.Module | Tensor] = {"ln": nn.LayerNorm(5), "s": nn.Parameter(torch.ones(5))}
    original, x = randomized(Small(function, **parts)).double(), sample(*shape)
    graph = ready(original, x)
    report = LowerAffines().run(graph)
    assert ("affine-into-norm" in report.applied) == takes
    found = original(x)
    assert distance(graph.run(x), found if isinstance(found, tuple) else [found]) < 1e-12


def test_eps_and_type_are_kept() -> None:
    norm = randomized(nn.LayerNorm(5, eps=0.3))
    graph, x = ready(norm, sample(4, 5, dtype=torch.float32)), sample(4, 5, dtype=torch.float32) * 1e-2
    LowerAffines().run(graph)
    assert calls(graph) == [ops.LAYER_NORM]
    assert torch.equal(graph.run(x)[0], norm(x))
