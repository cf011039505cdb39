"""Fine-tuning on integers by shifts: outputs are the engine's bits, gradients the float graph's, and training helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.nn import prepare_qat
from normfuse.quant.integer_forms import GeluForm, SoftmaxForm
from normfuse.recipe import Recipe
from normfuse.testing import seeded

WIDTH, TOKENS, CLASSES = 12, 7, 5


class Block(nn.Module):
    """Attention and a GELU, with nothing between them that would have to be trained along."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.head = nn.Linear(WIDTH, 20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores."""
        x = x + nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        scores: Tensor = self.head(nn.functional.gelu(self.up(x))).mean(1)
        return scores


def model() -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Block().eval()


X = 2 * torch.randn(24, TOKENS, WIDTH, generator=seeded(1))

FORMS = [(SoftmaxForm.SHIFTMAX, GeluForm.SHIFT), (SoftmaxForm.SHIFTMAX, GeluForm.LAMBDA_SHIFT)]


@pytest.mark.slow
@pytest.mark.parametrize(("softmax", "gelu"), FORMS)
def test_outputs_are_the_bits_of_the_engine_and_gradients_those_of_the_float_graph(
    softmax: SoftmaxForm, gelu: GeluForm
) -> None:
    recipe = Recipe(integer_only=True, effort=0, benchmark=False, softmax=softmax, gelu=gelu)
    built = normfuse.compile(model(), calibration={"x": X.numpy()}, recipe=recipe)
    training, exact = prepare_qat(model(), {"x": X.numpy()}, recipe=recipe), model()
    found = training(X)
    assert torch.equal(found.detach(), built.engine.graph.run(X)[0])
    weight = torch.randn(len(X), CLASSES, generator=seeded(5))
    (found * weight).sum().backward()
    (exact(X) * weight).sum().backward()
    for layer in (exact.q, exact.k, exact.v, exact.up, exact.head):
        wanted = layer.weight.grad
        assert wanted is not None
        directions = [
            nn.functional.cosine_similarity(weight.grad.flatten(), wanted.flatten(), 0)
            for weight in training.weights.values()
            if weight.grad is not None and weight.shape == wanted.shape
        ]
        # Published forms are some percent off; a lost path, or another layer's gradient, has another direction.
        assert max(directions) > 0.9


@pytest.mark.slow
def test_training_takes_back_what_the_forms_cost() -> None:
    recipe = Recipe(integer_only=True, softmax=SoftmaxForm.SHIFTMAX, gelu=GeluForm.SHIFT)
    training = prepare_qat(model(), {"x": X.numpy()}, recipe=recipe)
    with torch.no_grad():
        wanted = model()(X)
    optimizer = torch.optim.Adam(training.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(training(X), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
