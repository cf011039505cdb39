"""What the captured graph keeps of the model."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.graph import Graph, capture, query, verify
from normfuse.passes.canonicalize import Canonicalize
from normfuse.testing import Small, check_pass_contract, distance, randomized, seeded


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(7))


def captured(function: Callable[[Any, Tensor], Any], x: Tensor, **parts: nn.Module | Tensor) -> Graph:
    graph = capture(Small(function, **parts).eval(), (x,))
    verify(graph)
    return graph


def test_the_batch_stays_dynamic() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 7)))
    graph = capture(model, (sample(3, 3, 4, 4),))
    assert graph.has_dynamic_batch
    assert graph.notes == ()
    assert graph.input_specs[0].shape == (None, 3, 4, 4)
    for batch in (1, 2, 5):
        x = sample(batch, 3, 4, 4)
        torch.testing.assert_close(graph.run(x)[0], model(x), rtol=0, atol=0)


def test_an_example_of_one_sample_does_not_fix_the_batch() -> None:
    graph = capture(nn.Linear(3, 2), (sample(1, 3),))
    assert graph.has_dynamic_batch
    assert graph.run(sample(4, 3))[0].shape == (4, 2)


def test_a_model_that_fixes_its_batch_says_so() -> None:
    graph = captured(lambda m, x: x.reshape(3, 35) @ x.reshape(35, 3), sample(3, 5, 7))
    assert not graph.has_dynamic_batch
    assert graph.input_specs[0].shape == (3, 5, 7)
    assert "batch" in graph.notes[0]
    assert "s0" not in graph.text()


def test_an_example_that_is_a_view_brings_nothing_of_its_base() -> None:
    layer = randomized(nn.Linear(4, 3))
    graph = capture(layer, [sample(6, 8)[:2, :4]])
    assert graph.input_specs[0].shape == (None, 4)
    x = sample(5, 4)
    torch.testing.assert_close(graph.run(x)[0], layer(x), rtol=0, atol=0)


def test_a_broadcast_input_is_not_repeated() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    x, mask = sample(3, 5), sample(1, 5)
    graph = capture(Masked(), (x, mask))
    assert torch.equal(graph.run(x, mask)[0], x * mask)


def test_two_inputs_keep_their_names_and_order() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, position: Tensor) -> Tensor:
            return image - position

    image, position = sample(3, 5), sample(3, 1)
    graph = capture(Two(), (image, position))
    assert graph.input_names == ("image", "position")
    assert torch.equal(graph.run(image, position)[0], image - position)


def test_an_unused_input_stays() -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor, unused: Tensor) -> Tensor:
            return x + 1

    graph = capture(Unused(), (sample(3, 5), sample(3, 2)))
    assert graph.input_names == ("x", "unused")


def test_inputs_by_keyword_and_inputs_that_are_no_tensors() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, shift: Tensor) -> Tensor:
            return x * scale + shift if mask is None else x * mask

    x, shift = sample(3, 5), sample(3, 1)
    program = torch.export.export(Optional(), (x, None), {"scale": 2.0, "shift": shift})
    graph = capture(program)
    verify(graph)
    assert graph.input_names == ("x", "shift")
    assert torch.equal(graph.run(x, shift)[0], x * 2.0 + shift)


def test_any_number_of_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return torch.stack(parts).sum(0)

    x, y = sample(3, 5), sample(3, 5)
    graph = capture(Sum(), (x, y))
    assert graph.has_dynamic_batch
    assert torch.equal(graph.run(x, y)[0], x + y)


def test_integer_inputs() -> None:
    model = randomized(nn.Sequential(nn.Embedding(11, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    words = torch.randint(0, 11, (3, 4), generator=seeded(1))
    graph = capture(model, (words,))
    assert graph.input_specs[0].dtype == torch.int64
    assert torch.equal(graph.run(words)[0], model(words))


def test_one_tensor_stands_for_one_input() -> None:
    assert capture(nn.Linear(3, 2), sample(4, 3)).input_specs[0].shape == (None, 3)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Detection:
    boxes: Tensor
    scores: Tensor


torch.export.register_dataclass(Detection)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        pytest.param(lambda m, x: x + 1, ("output",), id="tensor"),
        pytest.param(lambda m, x: (x + 1, x * 2), ("output_0", "output_1"), id="tuple"),
        pytest.param(lambda m, x: [x + 1], ("output",), id="list of one"),
        pytest.param(lambda m, x: {"logits": x + 1, "tokens": x * 2}, ("logits", "tokens"), id="dict"),
        pytest.param(lambda m, x: {"logits": x + 1}, ("logits",), id="dict of one"),
        pytest.param(lambda m, x: {"logits": x + 1, "loss": None}, ("logits",), id="dict with None"),
        pytest.param(lambda m, x: {"a": {"t": x + 1}, "b": {"t": x * 2}}, ("output_0", "output_1"), id="same names"),
        pytest.param(lambda m, x: Pair(x + 1, x * 2), ("first", "second"), id="named tuple"),
        pytest.param(lambda m, x: Detection(x + 1, x * 2), ("boxes", "scores"), id="dataclass"),
    ],
)
def test_outputs_are_named(function: Callable[[Any, Tensor], Any], names: tuple[str, ...]) -> None:
    x = sample(3, 5)
    graph = captured(function, x)
    assert graph.output_names == names
    leaves = [leaf for leaf in pytree.tree_leaves(function(None, x)) if leaf is not None]
    assert all(map(torch.equal, graph.run(x), leaves))


class Frozen(nn.Module):
    """Trains, but for its batch norm: a mixture of modes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3).eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.fc(x)))


def test_a_training_model_is_captured_in_eval_mode_and_left_as_it_was() -> None:
    model = Frozen().train()
    model.norm.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    graph = capture(model, (sample(4, 5),))
    assert model.training
    assert model.fc.training
    assert not model.norm.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    x = sample(4, 5)
    assert torch.equal(graph.run(x)[0], model.eval()(x))


def test_a_scripted_module() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU()))
    x = sample(3, 5)
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(model)
    graph = capture(scripted, (x,))
    torch.testing.assert_close(graph.run(x)[0], model(x), rtol=1e-6, atol=1e-6)


def test_a_scripted_module_is_left_in_training_mode() -> None:
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5)).train())
    graph = capture(scripted, (sample(3, 5),))
    assert scripted.training
    assert torch.equal(graph.run(sample(3, 5))[0], graph.run(sample(3, 5))[0])


@pytest.mark.parametrize("traced", [False, True])
def test_a_frozen_scripted_module(traced: bool) -> None:
    model, x = randomized(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU())), sample(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(model, x) if traced else torch.jit.script(model)  # type: ignore[no-untyped-call]
        graph = capture(torch.jit.freeze(scripted), (x,))
    torch.testing.assert_close(graph.run(x)[0], model(x), rtol=1e-6, atol=1e-6)


def test_operations_in_place_become_functional() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.relu(m.conv(x))
        y[:, 1] += 2.0
        tripled: Tensor = y.mul_(3.0)
        return tripled

    x = sample(3, 2, 7)
    conv, relu = nn.Conv1d(2, 5, 3), nn.ReLU(inplace=True)
    graph = captured(function, x, conv=conv, relu=relu)
    expected = torch.relu(conv(x))
    expected[:, 1] += 2.0
    torch.testing.assert_close(graph.run(x)[0], expected * 3.0, rtol=1e-6, atol=1e-6)


def test_tied_weights_stay_equal() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.words(x))
            return logits

    words, model = torch.tensor([[1, 4, 2]]), Tied()
    graph = capture(model, (words,))
    verify(graph)
    assert torch.equal(graph.run(words)[0], model(words))


def test_an_unknown_operator_is_captured() -> None:
    x = sample(3, 5)
    graph = captured(lambda m, x: torch.special.i0e(x).cumsum(1), x)
    assert torch.equal(graph.run(x)[0], torch.special.i0e(x).cumsum(1))


def test_a_name_that_speaks_of_training_is_no_training() -> None:
    x, linear = sample(3, 5), nn.Linear(5, 2)
    graph = captured(lambda m, x: m.pretraining(x), x, pretraining=linear)
    torch.testing.assert_close(graph.run(x)[0], linear(x))


def test_checks_of_the_tracer_are_no_part_of_the_graph() -> None:
    graph = captured(lambda m, x: x.to(torch.float32) * 2, sample(3, 5))
    assert "assert" not in graph.text()
    check_pass_contract(Canonicalize(), graph, (sample(3, 5),))


def test_layers_are_found_again() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.ReLU(), nn.Linear(7, 3)))
    graph = capture(model, (sample(3, 5),))
    layers = [query.layer_of(node) for node in graph.nodes if node.op == "call_function"]
    assert layers == ["0", "1.0", "1.1"]


def test_a_view_does_not_depend_on_strides_that_the_exporter_has_guessed() -> None:
    """Fake tensors of a batch norm are contiguous, its results as its input lies."""
    model = Small(lambda m, x: (m.n(x.mT) + x.mT).mT.unflatten(1, (3, 2)).clone().flatten(-2), n=nn.BatchNorm1d(3))
    x = sample(2, 6, 3).double()
    graph = capture(randomized(model).double(), (x,))
    assert distance(graph.run(x), [model(x)]) < 1e-14
