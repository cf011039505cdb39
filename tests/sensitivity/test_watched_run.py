"""A watched run computes what the network does, and knows the gradients at every scored place."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch
from small_subject import EPS, activation_named, made, map_named, subject_of
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from normfuse.graph.quantization import is_requested
from normfuse.precision.simulation import Simulation
from normfuse.quant import snap
from normfuse.quant.bits import Bits
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import NOTHING, WatchedRun
from normfuse.testing import fold_tolerance, seeded

X = torch.randn(5, 3, 7, 5, generator=seeded(0))
CONV, HIDDEN, HEAD = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(24, 11), nn.Linear(11, 3)


@cache
def subject() -> Subject:
    """Class scores, and their integers; 4 * 3 * 2 numbers are read by the hidden layer."""

    def function(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = m.head(m.hidden(m.conv(x).relu().flatten(1)).tanh())  # type: ignore[operator]
        return scores, scores.argmax(1)

    return subject_of(function, X, parts=made(conv=CONV, hidden=HIDDEN, head=HEAD))


def tolerance() -> float:
    return fold_tolerance(subject().graph, X)


def test_outputs_are_those_of_the_network_without_its_integers() -> None:
    (found,) = WatchedRun.of(subject(), [X]).outputs
    torch.testing.assert_close(found.detach(), subject().graph.run(X)[0], atol=tolerance(), rtol=0)


def test_what_is_watched() -> None:
    run = WatchedRun.of(subject(), [X])
    conv, hidden, head = subject().maps
    scored = [request.node for request in subject().activations]
    assert len(scored) == 2
    assert run.places.keys() == {conv, hidden, head, *scored}
    assert run.inputs.keys() == {conv, hidden, head}
    assert run.weights == {}
    assert torch.equal(run.inputs[conv], X)
    assert torch.equal(run.inputs[hidden], run.places[scored[0]].detach())
    assert not any(x.requires_grad for x in run.inputs.values())
    read = HIDDEN(CONV(X).relu().flatten(1)).tanh().detach()
    torch.testing.assert_close(run.inputs[head], read, atol=tolerance(), rtol=0)


def test_what_enters_the_model_is_no_place() -> None:
    (entering,) = (
        node for node in subject().graph.nodes if is_requested(node) and node.args[0] in subject().graph.inputs
    )
    assert entering not in WatchedRun.of(subject(), [X]).places


def by_hand(cotangent: Tensor) -> dict[str, Tensor]:
    """Gradients in float64, place by place."""
    conv, hidden, head = (deepcopy(part).double() for part in (CONV, HIDDEN, HEAD))
    found = {"conv": conv(X.double())}
    found["read by hidden"] = found["conv"].relu().flatten(1)
    found["hidden"] = hidden(found["read by hidden"])
    found["read by head"] = found["hidden"].tanh()
    found["head"] = head(found["read by head"])
    return dict(zip(found, torch.autograd.grad(found["head"], list(found.values()), cotangent.double()), strict=True))


def test_gradients_at_every_place() -> None:
    cotangent = torch.randn(5, 3, generator=seeded(1))
    found = WatchedRun.of(subject(), [X]).gradients([cotangent])
    expected = by_hand(cotangent)
    assert len(found) == len(expected)
    for name, gradient in expected.items():
        reads = name.removeprefix("read by ")
        place = activation_named(subject(), reads).node if reads != name else map_named(subject(), name)
        # Products of at most 24 numbers, three in a row, whose factors are those of the gradient but for some 4.
        torch.testing.assert_close(
            found[place].double(), gradient, atol=72 * 4 * EPS * float(gradient.abs().max()), rtol=0
        )


def test_gradients_of_weights_where_they_are_asked_for() -> None:
    run = WatchedRun.of(subject(), [X], with_weights=True)
    conv, hidden, head = subject().maps
    assert list(run.weights) == [conv, hidden, head]
    cotangent = torch.randn(5, 3, generator=seeded(1))
    found = torch.autograd.grad(run.outputs, list(run.weights.values()), [cotangent])
    # The weight's gradient is that at the map's output times what the map reads.
    at = by_hand(cotangent)
    read = deepcopy(CONV).double()(X.double()).relu().flatten(1).detach()
    expected = at["hidden"].T @ read
    torch.testing.assert_close(found[1].double(), expected, atol=72 * 4 * EPS * float(expected.abs().max()), rtol=0)
    expected = conv2d_weight(X.double(), list(CONV.weight.shape), at["conv"], stride=2)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found[0].double(), expected, atol=72 * 4 * EPS * float(expected.abs().max()), rtol=0)


def test_a_base_is_quantized_and_gradients_pass_its_rounding() -> None:
    """With 2-bit weights and 3-bit activations; in front of the codes, gradients are those of these weights."""
    base = subject().uniform(Bits(2, 3))
    run = WatchedRun.of(subject(), [X], base=base)
    simulated = subject().graph.run_as([X], Simulation(base))[0]
    torch.testing.assert_close(run.outputs[0], simulated, atol=tolerance(), rtol=0)
    request, (_, _, head) = activation_named(subject(), "head"), subject().maps
    params = base.activations[request.source.name]
    place = run.places[request.node].detach()
    assert not torch.equal(snap(place, params), place)
    torch.testing.assert_close(run.inputs[head], snap(place, params), atol=EPS, rtol=EPS)  # it is x + (snap - x)
    cotangent = torch.randn(5, 3, generator=seeded(1))
    expected = cotangent.double() @ base.weights[head.name].values.double()
    found = run.gradients([cotangent])[request.node].double()
    torch.testing.assert_close(found, expected, atol=8 * EPS * float(expected.abs().max()), rtol=0)


def test_nothing_is_the_float_network() -> None:
    plain, based = WatchedRun.of(subject(), [X]), WatchedRun.of(subject(), [X], base=NOTHING)
    assert torch.equal(plain.outputs[0], based.outputs[0])


def test_outputs_that_no_place_leads_to_have_no_gradients() -> None:
    """The second output is made of the input alone."""
    parted = subject_of(lambda m, x: (m.a(x), x[:, :2] * 3), X.flatten(1)[:, :9], parts=made(a=nn.Linear(9, 4)))
    run = WatchedRun.of(parted, parted.chunks[0])
    (node,) = parted.maps
    found = run.gradients([torch.full((5, 4), 2.0), torch.ones(5, 2)])
    assert found[node].tolist() == [[2.0] * 4] * 5


def test_a_place_that_leads_to_integers_alone_has_zeros() -> None:
    parts = made(a=nn.Linear(9, 4), b=nn.Linear(4, 6))
    parted = subject_of(lambda m, x: (y := m.a(x).relu(), m.b(y).argmax(1)), X.flatten(1)[:, :9], parts=parts)
    run = WatchedRun.of(parted, parted.chunks[0])
    found = run.gradients([torch.ones(5, 4)])
    assert not bool(found[map_named(parted, "b")].any())
    assert bool(found[map_named(parted, "a")].any())
