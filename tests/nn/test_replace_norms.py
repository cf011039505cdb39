"""replace_norms on plain modules and on a transformers model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normfuse.nn import PRepBN, RepBN, UnifiedNorm, replace_norms


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.image_norm = nn.LayerNorm((5, 6))
        self.again = self.norm1

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.again(self.norm2(self.norm1(x)))
        return normed


def test_norms_over_the_last_axis_are_replaced() -> None:
    model = nn.Sequential(Block(), nn.LayerNorm(6)).eval()
    assert replace_norms(model, UnifiedNorm) == ["0.norm1", "0.norm2", "0.again", "1"]
    block = model[0]
    assert isinstance(block, Block)
    assert isinstance(block.norm1, UnifiedNorm)
    assert block.again is block.norm1
    assert isinstance(block.image_norm, nn.LayerNorm)
    assert not block.norm1.training
    assert model(torch.ones(2, 5, 6)).shape == (2, 5, 6)


def test_the_choice_is_the_callers() -> None:
    model = nn.Sequential(Block(), nn.LayerNorm(7))
    assert replace_norms(model, RepBN, only=lambda path, norm: norm.normalized_shape == (7,)) == ["1"]
    assert replace_norms(model, RepBN, only=lambda path, norm: path.endswith("norm2")) == ["0.norm2"]


def test_type_and_device_are_kept() -> None:
    plain, outer = nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 6, dtype=torch.float16)
    inner = nn.Sequential(plain, nn.Linear(6, 6, dtype=torch.float64, device="meta"))
    model = nn.Sequential(
        outer, nn.LayerNorm(6, dtype=torch.bfloat16), inner, nn.LayerNorm(6, elementwise_affine=False)
    )
    replace_norms(model, UnifiedNorm)
    weights = [module.weight for module in model.modules() if isinstance(module, UnifiedNorm)]
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert [(weight.dtype, weight.device) for weight in weights] == [
        (torch.bfloat16, cpu),
        (torch.float64, meta),  # the nearest module around it, not the model's first
        (torch.float16, cpu),
    ]
    assert all(module.running_var.dtype == module.weight.dtype for module in model if isinstance(module, UnifiedNorm))


def test_a_model_without_parameters_keeps_what_the_factory_makes() -> None:
    model = nn.Sequential(nn.LayerNorm(6, elementwise_affine=False))
    replace_norms(model, UnifiedNorm)
    assert model[0].get_parameter("weight").dtype == torch.float32


def test_a_model_without_layer_norms_is_left() -> None:
    assert replace_norms(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), UnifiedNorm) == []
    assert replace_norms(nn.LayerNorm(3), UnifiedNorm) == []


@pytest.mark.slow  # importing transformers alone takes longer than a test should
@pytest.mark.parametrize("factory", [UnifiedNorm, PRepBN])
def test_a_vision_transformer_of_transformers(factory: type[UnifiedNorm | PRepBN]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    paths = replace_norms(model, factory)
    assert len(paths) == 5
    assert not any(isinstance(module, nn.LayerNorm) for name, module in model.named_modules() if "norm1" not in name)
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model.train()(pixels).logits.sum().backward()
    replaced = [model.get_submodule(path) for path in paths]
    assert all(next(norm.parameters()).grad is not None for norm in replaced)
    exported = torch.export.export(model.eval(), (pixels,)).module()
    torch.testing.assert_close(exported(pixels).logits, model(pixels).logits, rtol=0, atol=0)
