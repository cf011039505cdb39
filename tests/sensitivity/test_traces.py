"""Traces of the Fisher information and of the Hessian, against autograd, sample by sample and part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from small_subject import EPS, activation_named, made, map_named, subject_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import log_softmax

from normfuse.progress import Silent
from normfuse.sensitivity import traces
from normfuse.sensitivity.sensitivity import Kind
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.traces import Traces, fisher_traces, hessian_traces
from normfuse.testing import seeded

X = torch.randn(5, 2, 7, 5, generator=seeded(0))
PARTS = made(conv=nn.Conv2d(2, 3, 3, stride=2), first=nn.Linear(18, 4), last=nn.Linear(4, 3), dense=nn.Conv2d(3, 4, 1))


def steps_to_classes(m: Any, x: Tensor) -> list[Tensor]:
    """What the maps read but for the image, then the outputs; the last map reads what the one before it writes."""
    read = m["conv"](x).tanh().flatten(1)
    return [read, (y := m["first"](read)), m["last"](y)]


def steps_to_pixels(m: Any, x: Tensor) -> list[Tensor]:
    read = m["conv"](x).sigmoid()
    return [read, m["dense"](read)]


RELATIVE = 4 * 3 * 18 * EPS
"""What is squared or derived twice has passed three maps there and back, each of sums of at most 18."""

Steps = Callable[[Any, Tensor], list[Tensor]]
NETWORKS: dict[Steps, list[str]] = {steps_to_classes: ["conv", "first", "last"], steps_to_pixels: ["conv", "dense"]}


@cache
def subject(steps: Steps, sizes: tuple[int, ...] = (3, 2)) -> Subject:
    def function(m: Any, x: Tensor) -> Tensor:
        return steps(vars(m)["_modules"], x)[-1]

    return subject_of(function, X, sizes=sizes, parts={name: PARTS[name] for name in NETWORKS[steps]})


def weight_in(parts: Any, layer: str) -> Tensor:
    found: Tensor = parts[layer].weight
    return found


def surprise(scores: Tensor) -> Tensor:
    """Of one sample: ``-log p`` of the class that is found, the mean over pixels."""
    return -log_softmax(scores, dim=1).amax(dim=1).mean()


def parts_of(steps: Steps) -> list[tuple[Kind, str, str]]:
    """Kind, name and layer (of activations: that reads them)."""
    found, (_, *readers) = subject(steps), NETWORKS[steps]
    weights = [(Kind.WEIGHT, map_named(found, layer).name, layer) for layer in NETWORKS[steps]]
    return weights + [(Kind.ACTIVATION, activation_named(found, layer).source.name, layer) for layer in readers]


@pytest.mark.parametrize("steps", NETWORKS)
def test_fisher_squares_the_gradients_of_every_sample(steps: Steps) -> None:
    found = fisher_traces(subject(steps), progress=Silent())
    wide = {name: deepcopy(part).double() for name, part in PARTS.items()}
    expected: dict[tuple[Kind, str], float] = {}
    for x in X.double()[:, None]:
        *read, scores = steps(wide, x)
        places = [*(weight_in(wide, layer) for layer in NETWORKS[steps]), *read]
        for (kind, name, _), gradient in zip(
            parts_of(steps), torch.autograd.grad(surprise(scores), places), strict=True
        ):
            expected[kind, name] = expected.get((kind, name), 0.0) + float(gradient.square().sum()) / len(X)
    for (kind, name), amount in expected.items():
        assert found.by_kind[kind][name] == pytest.approx(amount, rel=RELATIVE)
    assert sum(map(len, found.by_kind.values())) == len(expected)


@pytest.mark.parametrize(
    "method", [fisher_traces, lambda found, **given: hessian_traces(found, seed=0, probes=1, **given)]
)
@pytest.mark.parametrize("steps", NETWORKS)
def test_elements_are_those_of_one_sample(steps: Steps, method: Callable[..., Traces]) -> None:
    """A map and the activation that it writes have one name, and elements of their own."""
    found = method(subject(steps), progress=Silent()).elements
    *read, _ = steps(PARTS, X[:1])
    sizes = [each.numel() for each in (*(weight_in(PARTS, layer) for layer in NETWORKS[steps]), *read)]
    assert [found[kind][name] for kind, name, _ in parts_of(steps)] == sizes


@pytest.mark.parametrize("steps", NETWORKS)
def test_fisher_does_not_see_chunks(steps: Steps) -> None:
    one, other = (fisher_traces(subject(steps, sizes), progress=Silent()) for sizes in ((3, 2), (1, 4)))
    for kind, name, _ in parts_of(steps):
        assert one.by_kind[kind][name] == other.by_kind[kind][name]


def exact_trace(steps: Steps, kind: Kind, layer: str) -> float:
    """The trace of the second derivatives, the mean over samples, all of them written out."""
    wide = nn.ModuleDict({name: deepcopy(part).double() for name, part in PARTS.items()})
    place = NETWORKS[steps].index(layer) - 1
    total = 0.0
    for x in X.double()[:, None]:

        def at_weight(weight: Tensor, x: Tensor = x) -> Tensor:
            return surprise(functional_call(Whole(steps, wide), {f"parts.{layer}.weight": weight}, (x,)))

        def at_activation(value: Tensor, x: Tensor = x) -> Tensor:
            return surprise(_behind(wide, NETWORKS[steps][place + 1 :], value))

        at = weight_in(wide, layer) if kind is Kind.WEIGHT else steps(wide, x)[place]
        function = at_weight if kind is Kind.WEIGHT else at_activation
        found = torch.autograd.functional.hessian(function, at.detach())  # type: ignore[no-untyped-call]
        total += float(found.reshape(at.numel(), at.numel()).trace()) / len(X)
    return total


class Whole(nn.Module):
    """The outputs alone."""

    def __init__(self, steps: Steps, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.steps, self.parts = steps, parts

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self.parts, x)[-1]


def _behind(parts: nn.ModuleDict, layers: Sequence[str], value: Tensor) -> Tensor:
    """What maps make of an activation; between these there is nothing."""
    for layer in layers:
        value = parts[layer](value)
    return value


PLACES = [
    pytest.param(steps, kind, layer, id=f"{kind.value} {layer} of {len(layers)}")
    for steps, layers in NETWORKS.items()
    for kind in Kind
    for layer in (layers if kind is Kind.WEIGHT else layers[1:])
]


class OrthogonalSigns:
    """Rows of a Hadamard matrix in the place of random signs, each cut into the leaves.

    The mean of ``v v^T`` over all of them is the identity, so that chance adds no error.
    """

    def __init__(self) -> None:
        self.rows = torch.tensor([[1.0]])
        for _ in range(8):
            self.rows = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), self.rows)
        self.starts, self.calls, self.end = dict[int, int](), Counter[int](), 0

    def __call__(self, x: Tensor, _: torch.Generator) -> Tensor:
        if id(x) not in self.starts:
            self.starts[id(x)], self.end = self.end, self.end + x.numel()
        assert self.end <= len(self.rows)
        start, row = self.starts[id(x)], self.calls[id(x)]
        self.calls[id(x)] += 1
        return self.rows[row, start : start + x.numel()].reshape(x.shape)


@cache
def exhausted(steps: Steps) -> Traces:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normfuse.sensitivity.traces._signs", OrthogonalSigns())
        return hessian_traces(subject(steps, (5,)), seed=0, probes=256, progress=Silent())


@pytest.mark.parametrize(("steps", "kind", "layer"), PLACES)
def test_the_hessian_by_all_signs_is_exact(steps: Steps, kind: Kind, layer: str) -> None:
    (name,) = (name for each, name, of in parts_of(steps) if each is kind and of == layer)
    exact = exact_trace(steps, kind, layer)
    assert exhausted(steps).by_kind[kind][name] == pytest.approx(exact, rel=RELATIVE)


@cache
def drawn(steps: Steps) -> list[Traces]:
    return [hessian_traces(subject(steps), seed=seed, progress=Silent()) for seed in range(12)]


@pytest.mark.parametrize(("steps", "kind", "layer"), PLACES)
def test_the_hessian_is_met_within_the_error_of_the_probes(steps: Steps, kind: Kind, layer: str) -> None:
    (name,) = (name for each, name, of in parts_of(steps) if each is kind and of == layer)
    amounts = [found.by_kind[kind][name] for found in drawn(steps)]
    deviation = stdev(amounts) / len(amounts) ** 0.5
    # Of 12 runs (Student's distribution), one mean in a thousand is farther off.
    assert fmean(amounts) == pytest.approx(exact_trace(steps, kind, layer), abs=4.5 * deviation)


def test_signs_are_signs() -> None:
    found = traces._signs(torch.zeros(7, 300), seeded(0))
    assert set(found.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(found.mean())) < 5 / found.numel() ** 0.5
    assert found.dtype is torch.float32


def test_the_seed_decides() -> None:
    one, same, other = (
        hessian_traces(subject(steps_to_classes), seed=seed, probes=2, progress=Silent()) for seed in (4, 4, 5)
    )
    for kind, name, _ in parts_of(steps_to_classes):
        assert one.by_kind[kind][name] == same.by_kind[kind][name]
        assert one.by_kind[kind][name] != other.by_kind[kind][name]


@pytest.mark.parametrize("method", [fisher_traces, lambda found, **given: hessian_traces(found, seed=0, **given)])
def test_what_leads_to_integers_alone_has_no_curvature(method: Callable[..., Traces]) -> None:
    parts = made(a=nn.Linear(9, 4), b=nn.Linear(4, 6))
    found = subject_of(lambda m, x: (y := m.a(x).tanh(), m.b(y).argmax(1)), X.flatten(1)[:, :9], parts=parts)
    weights = method(found, progress=Silent()).by_kind[Kind.WEIGHT]
    assert weights[map_named(found, "b").name] == 0
    assert weights[map_named(found, "a").name] != 0


def test_samples_of_a_fixed_batch_have_one_gradient() -> None:
    """Two images that are always run together: what both give is squared, and shared by two."""
    x = torch.randn(2, 9, generator=seeded(1))
    parts = made(a=nn.Linear(9, 4))
    found = subject_of(lambda m, x: m.a(x.reshape(2, 9)), x, parts=parts)
    assert not found.graph.has_dynamic_batch
    amount = fisher_traces(found, progress=Silent()).by_kind[Kind.WEIGHT]["linear"]
    wide = deepcopy(parts["a"]).double()
    losses = -log_softmax(wide(x.double()), dim=1).amax(dim=1)
    (gradient,) = torch.autograd.grad(losses.sum(), [weight_in({"a": wide}, "a")])
    assert amount == pytest.approx(float(gradient.square().sum()) / 2, rel=64 * EPS)
