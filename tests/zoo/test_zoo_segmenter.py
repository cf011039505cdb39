"""The zoo's segmenter: masks are products of patch and class tokens, upsampled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.models import MODELS
from examples.zoo.segmenter import Segmenter, SegmenterShape

SHAPE = SegmenterShape(size=12, classes=5, width=6, depth=1, heads=2)


def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(SHAPE, nn.LayerNorm).eval()


def projected(model: Segmenter, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the projections of patches and classes give, and the logits."""
    kept: dict[str, Tensor] = {}
    for name in ("patch_proj", "class_proj"):
        getattr(model, name).register_forward_hook(lambda part, given, found, name=name: kept.update({name: found}))
    with torch.no_grad():
        logits = model(image)
    return kept["patch_proj"], kept["class_proj"], logits


def test_a_mask_is_the_product_of_patches_and_a_class() -> None:
    model, image = segmenter(), torch.randn(2, 1, 12, 12)
    patches, classes, logits = projected(model, image)
    assert (patches.shape, classes.shape) == ((2, 9, 6), (2, 5, 6))
    coarse = torch.einsum("npw,ncw->ncp", patches, classes).reshape(2, 5, 3, 3) / 6**0.5
    expected = F.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=False)
    # Sums of 6 products and of 4 weighted values, in another order.
    torch.testing.assert_close(logits, expected, rtol=0, atol=10 * 1.2e-7 * float(coarse.abs().max()))


def test_patches_and_classes_see_each_other() -> None:
    model, image = segmenter(), torch.randn(1, 1, 12, 12)
    patches, classes, _ = projected(model, image)
    others, _, _ = projected(model, image + F.pad(torch.ones(1, 1, 2, 2), (0, 10, 0, 10)))
    assert bool((patches != others).any(dim=-1).all())  # one corner changed: every patch knows
    with torch.no_grad():
        model.classes[:, 3] = torch.randn(6)  # not a sum with one number: layer norm would take that out
    changed, turned, _ = projected(model, image)
    assert bool((patches != changed).any(dim=-1).all())
    assert bool((classes != turned).any(dim=-1).all())


def test_the_committed_network_has_layer_norms_only() -> None:
    model = MODELS["scenes_segmenter_ln"].build(100)
    assert isinstance(model, Segmenter)
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert {type(norm) for norm in norms} == {nn.LayerNorm}
    assert len(norms) == 2 * (len(model.blocks) + 1) + 1
