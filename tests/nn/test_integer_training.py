"""What is trained is what ships: outputs are the engine's bits, gradients the float graph's, and training helps."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.build import FOLDING
from normfuse.capturing import capture_model
from normfuse.errors import UnsupportedModel, UsageError
from normfuse.nn import IntegerTraining, prepare_qat
from normfuse.quant.integer_forms import SoftmaxForm
from normfuse.recipe import Recipe
from normfuse.testing import randomized, seeded

CHANNELS, CLASSES = 12, 5


class Block(nn.Module):
    """A convolution, a norm, a function and a residual: one of everything that has a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, CHANNELS, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 20), nn.Linear(20, CHANNELS, bias=False)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores."""
        x = self.stem(image).relu().flatten(2).mT
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        scores: Tensor = self.head(x.mean(1))
        return scores


def model() -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Block().eval()


IMAGES = torch.randn(24, 2, 9, 7, generator=seeded(1))


def prepared(**options: object) -> IntegerTraining:
    return prepare_qat(model(), {"image": IMAGES.numpy()}, **options)  # type: ignore[arg-type]


def test_outputs_are_the_bits_of_the_engine() -> None:
    built = normfuse.compile(
        model(), calibration={"image": IMAGES.numpy()}, recipe=Recipe(integer_only=True, effort=0, benchmark=False)
    )
    engine = built.engine.graph
    found = prepared()(IMAGES)
    assert found.requires_grad
    assert torch.equal(found.detach(), engine.run(IMAGES)[0])


def test_every_weight_and_bias_has_a_gradient_near_that_of_the_float_model() -> None:
    training, exact = prepared(), model()
    weight = torch.randn(len(IMAGES), CLASSES, generator=seeded(5))
    (training(IMAGES) * weight).sum().backward()
    (exact(IMAGES) * weight).sum().backward()
    assert len(training.weights) == len(training.biases) == 4
    for parameter in training.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert float(parameter.grad.abs().max()) > 0
    for layer in (exact.stem, exact.up, exact.down, exact.head):
        wanted = layer.weight.grad
        (found,) = (weight.grad for weight in training.weights.values() if weight.shape == layer.weight.shape)
        assert wanted is not None
        assert found is not None
        # Codes are a few tenths of a percent off; a wrong path (a lost residual, a wrong mask) shows in the direction.
        assert nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.99


def test_gradients_stop_where_codes_have_ended() -> None:
    training = prepared()
    image = (1000 * IMAGES).requires_grad_()
    training(image).sum().backward()
    assert image.grad is not None
    beyond = image.detach().abs() > 2 * float(IMAGES.abs().max())
    assert float(beyond.double().mean()) > 0.9
    assert not bool(image.grad[beyond].any())
    inside = IMAGES.clone().requires_grad_()
    training(inside).sum().backward()
    assert inside.grad is not None
    assert float((inside.grad != 0).double().mean()) > 0.5


def test_a_step_changes_the_integers() -> None:
    training = prepared()
    before = training(IMAGES).detach()
    with torch.no_grad():
        for weight in training.weights.values():
            weight.mul_(0.5)
    assert not torch.equal(training(IMAGES).detach(), before)


def test_training_brings_the_integers_nearer_to_the_float_model() -> None:
    training, exact = prepared(), model()
    with torch.no_grad():
        wanted = exact(IMAGES)
        for weight in training.weights.values():  # as coarse rounding would
            weight += 0.1 * weight.abs().mean() * torch.randn(weight.shape, generator=seeded(weight.numel()))
    optimizer = torch.optim.Adam(training.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(training(IMAGES), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4


def test_what_is_saved_compiles_to_what_was_trained(tmp_path: Path) -> None:
    training = prepared()
    with torch.no_grad():
        for weight in training.weights.values():
            weight *= 0.9
    training.save(tmp_path / "tuned.pt2")
    built = normfuse.compile(
        tmp_path / "tuned.pt2",
        calibration={"image": IMAGES.numpy()},
        recipe=Recipe(integer_only=True, benchmark=False),
    )
    float_outputs = training.tuned().run(IMAGES)[0]
    (found,) = built.engine.graph.run(IMAGES)
    assert not torch.allclose(float_outputs, model()(IMAGES).detach(), rtol=0.02)
    spread = float(float_outputs.std())
    assert float((found - float_outputs).abs().max()) < 0.1 * spread


def test_only_weights_near_a_border_move_where_the_rest_is_frozen() -> None:
    within = 0.1
    training = prepared(free_within=within)
    training(IMAGES).square().sum().backward()
    for name, weight in training.weights.items():
        gradient = weight.grad
        assert gradient is not None
        params = training._plan.weights[name].params
        steps = weight.detach() / params.granularity.spread(params.scale, weight.shape)
        near = (steps - steps.floor() - 0.5).abs() <= within
        assert not bool(gradient[~near].any())
        assert bool(gradient[near].any())
    for bias in training.biases.values():
        assert bias.grad is not None


@pytest.mark.parametrize("within", [0.0, -0.1, 0.51, float("nan")])
def test_a_distance_that_is_none_is_refused(within: float) -> None:
    with pytest.raises(UsageError, match="free_within"):
        prepared(free_within=within)


def test_a_folded_graph_is_taken_as_it_is() -> None:
    graph = capture_model(model(), IMAGES[:2])
    FOLDING.run(graph)
    before = graph.text()
    training = prepare_qat(graph, {"image": IMAGES.numpy()})
    assert torch.equal(training(IMAGES).detach(), prepared()(IMAGES).detach())
    assert graph.text() == before


def test_what_cannot_be_integers_is_refused_with_its_layer() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).cumsum(1)

    with pytest.raises(UnsupportedModel, match="cumsum"):
        prepare_qat(Sorted(), {"x": np.ones((8, 4), np.float32)})(torch.ones(2, 4))


def test_batches_of_any_size() -> None:
    training = prepared()
    whole = training(IMAGES).detach()
    parts = [training(part).detach() for part in torch.split(IMAGES, 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert len(list(itertools.chain(training.parameters()))) == 8


class Convolutions(nn.Module):
    """What integers do not know by name: convolutions of one axis behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 5, 3), nn.Conv1d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(torch.nn.functional.avg_pool1d(x, 2))))  # type: ignore[no-any-return]


class Stream(nn.Module):
    """A stream that a map and a sum read: 8 bits are made of its 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(7, 6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.down(torch.nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


class Masked(nn.Module):
    """Attention whose scale is folded into the queries' map once it is spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(7, 8) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask[:, None, :])


def test_pooling_is_not_trained() -> None:
    """Integers average by a convolution, whose weights are nobody's parameters."""
    model: nn.Module = randomized(Convolutions().eval())
    training = prepare_qat(model, {"x": torch.randn(16, 3, 18, generator=seeded(2)).numpy()})
    assert sorted(weight.shape for weight in training.weights.values()) == [(4, 5, 1, 1), (5, 3, 1, 3)]


@pytest.mark.parametrize(("network", "shape"), [(Convolutions, (3, 18)), (Stream, (4, 7))])
def test_what_is_written_is_what_is_tuned(network: type[nn.Module], shape: tuple[int, ...]) -> None:
    model: nn.Module = randomized(network().eval())
    x = torch.randn(16, *shape, generator=seeded(2))
    training = prepare_qat(model, {"x": x.numpy()})
    with torch.no_grad():
        before = training(x)
        for parameter in training.parameters():
            parameter.mul_(0.9)
        after, tuned = training(x), training.tuned().run(x)[0]
    assert float((after - tuned).norm()) < 0.1 * float((after - before).norm())


@pytest.mark.parametrize("form", SoftmaxForm)
def test_attention_that_is_spelled_out_is_tuned_too(form: SoftmaxForm) -> None:
    model: nn.Module = randomized(Masked().eval())
    mask = torch.arange(5) <= (torch.arange(16) % 5)[:, None]
    samples = {"x": torch.randn(16, 5, 7, generator=seeded(2)), "mask": mask}
    recipe = Recipe(integer_only=True, softmax=form)
    training = prepare_qat(model, {name: each.numpy() for name, each in samples.items()}, recipe=recipe)
    with torch.no_grad():
        tuned, wanted = training.tuned().run(*samples.values())[0], model(*samples.values())
    assert float((tuned - wanted).norm() / wanted.norm()) < 0.02, "weights of 8 bits, and nothing else"
