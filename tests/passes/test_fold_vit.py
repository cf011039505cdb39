"""A whole vision transformer, scaled down: every frozen norm folds and the logits stay the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, query
from normfuse.graph.affine import AFFINE
from normfuse.nn import PRepBN, RepBN, UnifiedNorm, replace_norms
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.testing import distance, fold_tolerance, randomized, seeded

transformers = pytest.importorskip("transformers")

EXACT = 1e-10
Norm = Callable[[int], nn.Module]


def vit(norm: Norm | None) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    config.num_labels = 5
    model: nn.Module = transformers.ViTForImageClassification(config)
    if norm is not None:
        assert len(replace_norms(model, norm)) == 5
    return randomized(model)


def images(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=seeded(9)).to(dtype)


def affines(graph: Graph) -> int:
    return sum(query.is_call(node, AFFINE) for node in graph.nodes)


NORMS = [
    pytest.param(None, id="layer norm"),
    pytest.param(UnifiedNorm, id="un"),
    pytest.param(lambda width: PRepBN(width, total_step=0), id="prepbn"),
    pytest.param(RepBN, id="repbn"),
]


@pytest.mark.parametrize("norm", NORMS)
def test_every_affine_folds(norm: Norm | None) -> None:
    model = vit(norm).double()
    graph = capture(model, (images(2),))
    assert graph.output_names == ("logits",)
    Pipeline(phases=(CANONICAL, FOLD)).run(graph)
    assert affines(graph) == 0
    assert ("layer_norm" in graph.text()) == (norm is None)
    for batch in (1, 3):
        assert distance(graph.run(images(batch)), [model(images(batch)).logits]) < EXACT


@pytest.mark.parametrize("norm", NORMS)
def test_the_logits_stay_in_float32(norm: Norm | None) -> None:
    model, x = vit(norm), images(2, torch.float32)
    graph = capture(model, (x,))
    tolerance = fold_tolerance(graph, x)
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    torch.testing.assert_close(graph.run(x)[0], model(x).logits, rtol=0, atol=tolerance)
