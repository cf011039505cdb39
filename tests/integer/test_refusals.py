"""What has no integer form, or could overflow, is refused by its layer's name, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_module import build, module, normal
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.errors import UnsupportedModel, UsageError
from normfuse.recipe import Recipe
from normfuse.testing import Small, seeded


class Step(nn.Module):
    """A layer whose name is looked for."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def shared_heads(x: Tensor) -> Tensor:
    heads = x.reshape(-1, 4, 2, 3).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads[:, :1], heads[:, 1:], enable_gqa=True)


def float_mask(x: Tensor) -> Tensor:
    heads = x[:, None]
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=heads[..., :4])[:, 0]


STEPS: dict[str, nn.Module] = {
    "sort": Step(lambda x: x.sort(-1)[0]),
    "cumsum": Step(lambda x: x.cumsum(1)),
    "softmax": Step(lambda x: x.softmax(-1)),
    "division": Step(lambda x: x / (x * x + 1)),
    "square root": Step(lambda x: (x * x).sqrt()),
    "largest along an axis": Step(lambda x: x.amax(1, keepdim=True)),
    "mean over the batch": Step(lambda x: x.mean(0, keepdim=True)),
    "grouped queries": Step(shared_heads),
    "a mask that is computed": Step(float_mask),
    "a bound of a length that is felt": Step(lambda x: F.normalize(x, dim=-1, eps=0.5)),
    "uneven parts": Step(lambda x: F.adaptive_avg_pool1d(x, 5)),
    "a root": Step(lambda x: (x * x + 1) ** 0.5),
    "recurrence": nn.GRU(6, 6),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_an_operator_without_an_integer_form(step: nn.Module, tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        found = m.step(m.map(x))
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    refused(module(forward, map=nn.Linear(7, 6), step=step), normal(4, 4, 7), path=tmp_path / "integers.onnx")


def refused(network: nn.Module, *samples: Tensor, path: Path, where: str = "step", expected: str = "") -> None:
    """Check that a model is refused by a layer's name."""
    with pytest.raises(UnsupportedModel) as refusal:
        build(network, *samples, path=path)
    assert refusal.value.where == where
    assert expected in refusal.value.expected
    assert refusal.value.exit_code == 3
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("step", [nn.ConvTranspose2d(3, 2, 3), nn.Conv3d(1, 2, 1)])
def test_convolutions_without_an_integer_form(step: nn.Module, tmp_path: Path) -> None:
    network = module(lambda m, x: m.step(m.conv(x)), conv=nn.Conv2d(2, 3, 1), step=step)
    if isinstance(step, nn.Conv3d):
        network = module(lambda m, x: m.step(m.conv(x)[:, None]), conv=nn.Conv2d(2, 3, 1), step=step)
    refused(network, normal(4, 2, 5, 6), path=tmp_path / "integers.onnx")


def test_all_that_has_no_integer_form_is_named_at_once(tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.second(m.map(m.first(x)))  # type: ignore[no-any-return]

    first, second = Step(torch.sin), Step(lambda x: x.softmax(-1))
    network = module(forward, first=first, map=nn.Linear(7, 6), second=second)
    with pytest.raises(UnsupportedModel) as refusal:
        build(network, normal(4, 4, 7), path=tmp_path / "integers.onnx")
    assert refusal.value.what == "aten.sin has no integer form, and neither has aten.softmax.int at second"
    assert refusal.value.where == "first"


def test_floats_of_fewer_bits_are_named(tmp_path: Path) -> None:
    """The float engine's check, which comes first, cannot hold for them and would not say why."""
    network = nn.Sequential(nn.Linear(7, 64), nn.LayerNorm(64), nn.Linear(64, 5)).half().eval()
    samples = normal(16, 7).half().numpy()
    with pytest.raises(UnsupportedModel, match=r"the model computes in torch\.float16"):
        normfuse.compile(network, calibration=samples, recipe=Recipe(integer_only=True, benchmark=False))


ANSWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "comparison": lambda x: x > 0.5,
    "the two largest": lambda x: x.topk(2)[1],
    "order": lambda x: x.argsort(-1),
}


@pytest.mark.parametrize("function", ANSWERS.values(), ids=ANSWERS)
def test_answers_that_are_no_floats(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """Nothing asks for their codes, so what they read would stay float."""
    network = module(lambda m, x: m.step(m.map(x)), map=nn.Linear(7, 6), step=Step(function))
    refused(network, normal(4, 7), path=tmp_path / "integers.onnx")


def heavy(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """Return the layer with weights that all are the largest codes, and on no grid of fewer."""
    with torch.no_grad():
        layer.weight.uniform_(0.01, 0.01001, generator=seeded(0))
    return layer


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_type(kind: torch.dtype, tmp_path: Path) -> None:
    network = module(lambda m, x: m.step(x), step=nn.Linear(7, 6)).to(kind)
    refused(network, normal(4, 7).to(kind), path=tmp_path / "integers.onnx", where="x", expected="torch.float32")


def test_floats_of_another_type_in_the_middle(tmp_path: Path) -> None:
    network = module(lambda m, x: m.step(m.map(x)), map=nn.Linear(7, 6), step=Step(lambda x: x.double().relu().float()))
    refused(network, normal(4, 7), path=tmp_path / "integers.onnx", expected="torch.float32")


OVERFLOWS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "linear map": (heavy(nn.Linear(140_000, 1)), (140_000,), "2^31"),
    "convolution": (heavy(nn.Conv2d(20_000, 1, (1, 7))), (20_000, 1, 7), "2^31"),
    "product of activations": (Step(lambda x: x @ x.transpose(1, 2)), (1, 140_000), "2^31"),
    "attention": (Step(lambda x: F.scaled_dot_product_attention(x, x, x)), (2, 67_000), "66572"),
    "long attention": (Step(lambda x: F.scaled_dot_product_attention(x[:, :1], x, x)), (66_000, 2), "2^31"),
    "mean": (Step(lambda x: x.mean(-1)), (1, 140_000), "2^62"),
    "layer norm": (nn.LayerNorm(20_000), (20_000,), "16384"),
    "norm over two axes": (nn.LayerNorm((3, 6_000)), (3, 6_000), "16384"),
    "group norm": (nn.GroupNorm(1, 3), (3, 6_000), "16384"),
    "large eps": (nn.LayerNorm(5, eps=1e12), (5,), "2^62"),
}


@pytest.mark.parametrize(("step", "shape", "expected"), OVERFLOWS.values(), ids=OVERFLOWS)
def test_sums_that_could_overflow(step: nn.Module, shape: tuple[int, ...], expected: str, tmp_path: Path) -> None:
    network = Small(lambda m, x: m.step(x), step=step).eval()
    refused(network, normal(2, *shape), path=tmp_path / "integers.onnx", expected=expected)


RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"bits": 32}, "bits"),
    "activations of 4 bits": ({"bits": "w4a4"}, "bits"),
    "activations of 16 bits": ({"bits": "w8a16"}, "bits"),
    "mixed": ({"bits": "mixed", "budget": "bytes=0.2x"}, "bits"),
    "dynamic": ({"activations": "dynamic"}, "activations"),
    "asymmetric": ({"weights": "asymmetric"}, "weights"),
    "overrides": ({"overrides": "head=8"}, "overrides"),
    "tables": ({"table_bits": 4}, "table_bits"),
    "rotate": ({"rotate": True}, "rotate"),
    "equalize": ({"equalize": True}, "equalize"),
}


@pytest.mark.parametrize(("options", "name"), RECIPES.values(), ids=RECIPES)
def test_recipes_that_contradict_integers_alone(options: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Recipe().with_options(integer_only=True, **options)
    assert refusal.value.what.startswith(f"{name} cannot be ")
    assert "integer_only" in refusal.value.expected


def test_islands_are_allowed_beside_integers_only() -> None:
    with pytest.raises(UsageError, match="allow_float_islands cannot be True"):
        Recipe(allow_float_islands=True)


FORMS: list[tuple[str, str]] = [("softmax", "shiftmax"), ("gelu", "shift-gelu"), ("gelu", "lambda-shift-gelu")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_forms_are_of_integers_alone(name: str, form: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Recipe().with_options(**{name: form})
    assert refusal.value.what == f"{name} cannot be {form}"
    assert refusal.value.expected == "table (the default) without integer_only"


@pytest.mark.parametrize("name", ["softmax", "gelu"])
def test_a_form_that_is_none(name: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Recipe().with_options(integer_only=True, **{name: "exact"})
    assert refusal.value.what == f"{name} cannot be 'exact'"
    assert refusal.value.expected.startswith("table, shift")


@pytest.mark.parametrize("forms", [{}, *({name: form} for name, form in FORMS)])
def test_a_recipe_of_integers_can_be_read_back(forms: dict[str, str]) -> None:
    recipe = Recipe(integer_only=True, samples=3).with_options(**forms)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.label == "integers"


def test_scales_that_are_too_far_apart_for_a_multiplier(tmp_path: Path) -> None:
    """What is added is taken off again, so that nothing of it is left in the result's scale."""

    def forward(m: Any, x: Tensor) -> Tensor:
        large = m.map(x) * 1e14
        return m.step(large - 0.5 * large - 0.5 * large, x)  # type: ignore[no-any-return]

    network = module(forward, map=nn.Linear(7, 7), step=Step(lambda zero, x: zero * 1e-14 + x))
    with torch.no_grad():
        network.map.bias.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(UnsupportedModel, match="ratios up to") as refusal:
        build(network, normal(4, 7), path=tmp_path / "integers.onnx")
    assert refusal.value.where
