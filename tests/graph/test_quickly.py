"""Linear maps by another kernel are the same maps, whatever the sizes and strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import capture, ops
from normfuse.graph import quickly as module
from normfuse.graph.quickly import linear, quickly
from normfuse.testing import seeded


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("leading", "inputs", "outputs"),
    [((), 7, 3), ((1,), 1, 1), ((7,), 129, 1), ((2, 197), 64, 1823), ((3, 1, 5), 1823, 7), ((0,), 5, 2)],
)
def test_it_is_the_linear_map(leading: tuple[int, ...], inputs: int, outputs: int, has_bias: bool) -> None:
    x, weight = (torch.randn(*shape, inputs, generator=seeded(0)) for shape in (leading, (outputs,)))
    bias = torch.randn(outputs, generator=seeded(1)) if has_bias else None
    found = linear(x, weight, bias)
    wanted = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * inputs**0.5)


def test_strides_do_not_matter() -> None:
    x, weight = torch.randn(9, 5, 3, generator=seeded(0)), torch.randn(9, 4, generator=seeded(1))
    found = linear(x.permute(2, 1, 0), weight.mT)
    assert found.is_contiguous()
    torch.testing.assert_close(found, nn.functional.linear(x.permute(2, 1, 0).contiguous(), weight.mT.contiguous()))
    sliced = torch.randn(4, 10, generator=seeded(2))[:, ::2]
    torch.testing.assert_close(linear(sliced, weight.mT[:, :5]), sliced @ weight[:5])


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "x weight bias"])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_its_gradients_are_those_of_the_linear_map(leading: tuple[int, ...], wanted: str) -> None:
    shapes = {"x": (*leading, 5), "weight": (4, 5), "bias": (4,)}
    exact = {name: torch.randn(*shape, dtype=torch.float64, generator=seeded(0)) for name, shape in shapes.items()}
    gradients = list[list[Tensor]]()
    for function, dtype in ((linear, torch.float32), (nn.functional.linear, torch.float64)):
        given = {name: each.to(dtype).clone().requires_grad_(name in wanted.split()) for name, each in exact.items()}
        output = function(given["x"], given["weight"], given["bias"])
        (output.square() * torch.arange(1, 5)).sum().backward()
        assert all((each.grad is not None) == (name in wanted.split()) for name, each in given.items())
        gradients.append([each.grad.double() for each in given.values() if each.grad is not None])
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_computed_as_ever(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))


def test_what_is_not_finite_stays_so() -> None:
    weight = torch.ones(2, 3)
    found = linear(torch.tensor([[1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0], [1.0, 1.0, 1.0]]), weight)
    assert found[0].isnan().all()
    assert found[1].isinf().all()
    assert found[2].tolist() == [3.0, 3.0]


def test_a_network_is_what_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 17), nn.GELU(), nn.LayerNorm(17), nn.Linear(17, 5, bias=False)).eval()
    x, called = torch.randn(6, 11, generator=seeded(1)), list[Any]()
    graph = capture(model, [x])

    def compute(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called.append(node.target)
        return quickly(node, args, kwargs)

    with torch.no_grad():
        (found,) = graph.run_as([x], compute)
        wanted: Tensor = model(x)
    assert called.count(ops.LINEAR) == 2
    torch.testing.assert_close(found, wanted)


class _Another:
    """A kernel that PyTorch has changed: it takes other arguments, or computes something else."""

    def __init__(self, kernel: Any) -> None:
        self.default = kernel


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(lambda x, weight, bias: x, id="other arguments"),
        pytest.param(lambda *_: torch.ops.aten.mm(torch.ones(2, 3), torch.ones(2, 3)), id="refuses"),
        pytest.param(lambda x, weight, *_: nn.functional.linear(x, weight).relu(), id="another map"),
        pytest.param(lambda *_: torch.ones(1), id="another shape"),
        pytest.param(lambda *_: None, id="nothing"),
    ],
)
def test_a_kernel_that_has_changed_is_not_taken(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", _Another(kernel), raising=False)
    module._kernel.cache_clear()
    try:
        assert module._kernel() is None
        x, weight, bias = (torch.randn(*shape, generator=seeded(0)) for shape in ((3, 5), (2, 5), (2,)))
        assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))
    finally:
        module._kernel.cache_clear()


def test_where_the_processor_gains_the_kernel_is_taken() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        pytest.skip("no AVX-512, or a PyTorch without oneDNN")
    assert module._kernel() is not None
