"""An affine behind a linear map goes into it, exactly, or stays for a documented reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, query
from normfuse.graph.affine import AFFINE
from normfuse.nn import RepBN
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_affine_into_producer import FoldAffineIntoProducer, fold_after
from normfuse.passes.presets import CANONICAL
from normfuse.pipeline import Phase, Pipeline
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, seeded


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9), dtype=torch.float64)


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, Phase("norms", (FindAffines(),)))).run(graph)
    return graph


def conv_with_repbn() -> nn.Module:
    parts: dict[str, nn.Module] = {"conv": nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), "norm": RepBN(6)}
    return randomized(Small(lambda m, x: m.norm(m.conv(x).flatten(2).transpose(1, 2)), **parts)).double()


def test_picture(golden: Golden) -> None:
    graph = ready(conv_with_repbn(), sample(2, 4, 7, 5))
    before = graph.text()
    report = FoldAffineIntoProducer().run(graph)
    assert report.applied == {"fold-after-linear": 1}
    assert report.sites == ({"affine": "norm", "into": "conv", "formula": "W' = diag(a) W, b' = a b + c"},)
    assert picture(before, graph.text()) == golden


def test_numbers_and_contract() -> None:
    model, x = conv_with_repbn(), sample(2, 4, 7, 5)
    graph = ready(model, x)
    assert check_pass_contract(FoldAffineIntoProducer(), graph, (x,)).changed
    FoldAffineIntoProducer().run(graph)
    assert distance(graph.run(x), [model(x)]) < 1e-12


def test_the_bias_is_scaled_by_the_whole_scale() -> None:
    """SLAB's own script folds RepBN without eta * b; with a bias the two differ by just that (methods 2.6)."""
    model, x = conv_with_repbn(), sample(2, 4, 7, 5)
    conv: Any
    norm: Any
    conv, norm = model.conv, model.norm
    graph = ready(model, x)
    FoldAffineIntoProducer().run(graph)
    folded = dict(graph.module.named_buffers())["conv.bias"]
    scale = norm.bn.weight / torch.sqrt(norm.bn.running_var + norm.bn.eps)
    slab = scale * (conv.bias - norm.bn.running_mean) + norm.bn.bias
    torch.testing.assert_close(folded, slab + norm.alpha * conv.bias, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(folded, slab, rtol=1e-2)


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        pytest.param(
            lambda m, x: (y := m.f(x), m.n(y)), {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3)}, id="read by the output"
        ),
        pytest.param(
            lambda m, x: (y := m.f(x)).relu() + m.n(y), {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3)}, id="read (1)"
        ),
        pytest.param(
            lambda m, x: m.n(m.f(x.reshape(-1, 1, 5) * m.t)),
            {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3), "t": torch.ones(3, 5)},
            id="another axis of the same size (2)",
        ),
        pytest.param(
            lambda m, x: m.n(nn.functional.linear(x, x[:3])), {"n": nn.BatchNorm1d(3)}, id="variable weight (3)"
        ),
        pytest.param(
            lambda m, x: m.n(nn.functional.linear(x, m.w, x[0, :3])),
            {"w": torch.ones(3, 5), "n": nn.BatchNorm1d(3)},
            id="variable bias (3)",
        ),
        pytest.param(lambda m, x: m.n(m.f(x).relu()), {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3)}, id="no linear"),
    ],
)
def test_left_alone(function: Any, parts: dict[str, nn.Module | Tensor]) -> None:
    model, x = randomized(Small(function, **parts)).double(), sample(4, 5)
    graph = ready(model, x)
    before = graph.text()
    assert not FoldAffineIntoProducer().run(graph).changed
    assert graph.text() == before
    assert sum(query.is_call(node, AFFINE) for node in graph.nodes) == 1


def test_the_other_reader_of_a_weight_keeps_it() -> None:
    model = randomized(Small(lambda m, x: m.n(m.f(x)) * m.f(x.relu()), f=nn.Linear(5, 3), n=nn.BatchNorm1d(3)))
    model, x = model.double(), sample(4, 5)
    graph = ready(model, x)
    original = {path: tensor.clone() for path, tensor in graph.module.named_buffers() if path.startswith("f.")}
    FoldAffineIntoProducer().run(graph)
    constants = dict(graph.module.named_buffers())
    assert all(torch.equal(constants[path], tensor) for path, tensor in original.items())
    assert {"f.weight_1", "f.bias_1"} <= constants.keys()
    assert distance(graph.run(x), [model(x)]) < 1e-12


def test_a_shared_bias_keeps_its_other_reader() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        product: Tensor = m.n(nn.functional.linear(x, m.v, m.b)) * nn.functional.linear(x, m.w, m.b)
        return product

    parts = {"v": sample(3, 5), "w": sample(3, 5) + 1, "b": sample(3)}
    model = randomized(Small(function, n=nn.BatchNorm1d(3), **parts)).double()
    graph, x = ready(model, sample(4, 5)), sample(4, 5)
    FoldAffineIntoProducer().run(graph)
    assert distance(graph.run(x), [model(x)]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_arithmetic_is_rounded_once(dtype: torch.dtype) -> None:
    weight, bias = sample(5, 3, 2).to(dtype), sample(5).to(dtype)
    scale, shift = sample(5) * 3, sample(5) + 1
    folded_weight, folded_bias = fold_after(weight, bias, scale=scale, shift=shift)
    assert torch.equal(folded_weight, (weight.double() * scale.view(5, 1, 1)).to(dtype))
    assert torch.equal(folded_bias, (bias.double() * scale + shift).to(dtype))
    assert torch.equal(fold_after(weight, None, scale=scale, shift=shift)[1], shift.to(dtype))


def test_a_uniform_affine_fits_any_map() -> None:
    scale, shift = torch.tensor([2.0]).double(), torch.tensor([-1.0]).double()
    weight, bias = fold_after(torch.ones(4, 3), None, scale=scale, shift=shift)
    assert torch.equal(weight, torch.full((4, 3), 2.0))
    assert torch.equal(bias, torch.full((4,), -1.0))
