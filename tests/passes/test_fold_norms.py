"""Every frozen norm beside every linear map, in front of it and behind it (methods 13.1, 13.9 T1 to T4)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE
from normfuse.nn import (
    IBN,
    BatchChannelNorm,
    Deviation,
    EvoNormB0,
    PowerNorm,
    PRepBN,
    RepBN,
    StandardizedConv2d,
    UnifiedNorm,
)
from normfuse.nn.batch_channel_norm import EstBN
from normfuse.passes.presets import CANONICAL, FOLD
from normfuse.pipeline import Pipeline
from normfuse.testing import distance, randomized, seeded

EXACT = 1e-10
Norm = Callable[[int, int], nn.Module]


class Last(nn.Module):
    """A norm of the last axis, applied to axis 1."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        turned: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return turned


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS: dict[str, Norm] = {
    "batch norm": lambda channels, dims: BATCH_NORMS[dims - 1](channels),
    "estbn": lambda channels, dims: EstBN(channels),
    "un": lambda channels, dims: Last(UnifiedNorm(channels)),
    "repbn": lambda channels, dims: Last(RepBN(channels)),
    "prepbn": lambda channels, dims: Last(PRepBN(channels, total_step=0)),
    "power norm without groups": lambda channels, dims: Last(PowerNorm(channels, groups=None)),
}
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
ONLINE: dict[str, Norm] = {
    "layer norm": lambda channels, dims: Last(nn.LayerNorm(channels)),
    "rms norm": lambda channels, dims: Last(nn.RMSNorm(channels)),
    "power norm": lambda channels, dims: Last(PowerNorm(channels)),
    "group norm": lambda channels, dims: nn.GroupNorm(2, channels),
    "instance norm": lambda channels, dims: INSTANCE_NORMS[dims - 1](channels, affine=True),
}


class Turned(nn.Linear):
    """A linear map of axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


MAPS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: Turned(6, 4), (2, 6, 5)),
    "linear without bias": (lambda: Turned(6, 4, bias=False), (2, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), (2, 6, 5)),
    "conv1d, padded": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 5)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (2, 6, 5, 3)),
    "3x3": (lambda: nn.Conv2d(6, 4, 3), (2, 6, 5, 4)),
    "3x3, padded": (lambda: nn.Conv2d(6, 4, 3, padding=1, bias=False), (2, 6, 5, 4)),
    "grouped, padded": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "depthwise, padded": (lambda: nn.Conv2d(6, 12, (3, 2), padding=1, groups=6), (2, 6, 5, 4)),
    "dilated": (lambda: nn.Conv2d(6, 4, 2, dilation=(2, 1)), (2, 6, 5, 4)),
    "strided, padded": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=(0, 2)), (2, 6, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (2, 6, 3, 4, 2)),
    "conv3d, padded": (lambda: nn.Conv3d(6, 4, 2, padding=1, groups=2), (2, 6, 3, 4, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 2), (2, 6, 3, 4)),
    "transposed, strided, grouped": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2, padding=1), (2, 6, 5)),
}


class All(nn.Module):
    """Every map with its own norm, one output each: one capture for all of them."""

    def __init__(self, norm: Norm, *, is_before: bool) -> None:
        super().__init__()
        self.maps = nn.ModuleList([make() for make, _ in MAPS.values()])
        self.norms = nn.ModuleList()
        for module, (_, shape) in zip(self.maps, MAPS.values(), strict=True):
            outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            self.norms.append(norm(6 if is_before else int(outputs), len(shape) - 2))  # type: ignore[call-overload]
        self.is_before = is_before

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        ends: list[Tensor] = []
        for module, norm, x in zip(self.maps, self.norms, inputs, strict=True):
            ends.append(module(norm(x)) if self.is_before else norm(module(x)))
        return ends


def inputs() -> tuple[Tensor, ...]:
    generator = seeded(9)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _, shape in MAPS.values())


def folded(model: nn.Module, given: tuple[Tensor, ...]) -> Graph:
    graph = capture(model, given)
    Pipeline(phases=(CANONICAL, FOLD)).run(graph)
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_frozen_norm_beside_every_map(norm: str, is_before: bool) -> None:
    model, given = randomized(All(NORMS[norm], is_before=is_before)).double(), inputs()
    graph = folded(model, given)
    errors = [distance([found], [true]) for found, true in zip(graph.run(*given), model(*given), strict=True)]
    assert {name: error for name, error in zip(MAPS, errors, strict=True) if error > EXACT} == {}
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ONLINE)
def test_gamma_and_beta_before_every_map(norm: str) -> None:
    model, given = randomized(All(ONLINE[norm], is_before=True)).double(), inputs()
    graph = folded(model, given)
    errors = [distance([found], [true]) for found, true in zip(graph.run(*given), model(*given), strict=True)]
    assert {name: error for name, error in zip(MAPS, errors, strict=True) if error > EXACT} == {}
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)


def test_the_batch_norm_half_of_bcn_folds_into_the_convolution() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), BatchChannelNorm(4, groups=2))).double()
    x = torch.randn(2, 3, 5, 6, generator=seeded(9), dtype=torch.float64)
    graph = folded(model, (x,))
    assert "batch_norm" not in graph.text()
    assert distance(graph.run(x), [model(x)]) < EXACT


@pytest.mark.parametrize(
    ("norm", "left"),
    [
        pytest.param(lambda: BatchChannelNorm(6, groups=2), 0, id="bcn"),
        pytest.param(lambda: BatchChannelNorm(6, groups=3, is_estimated=True), 0, id="bcn with estbn"),
        pytest.param(lambda: IBN(6, ratio=0.4), 0, id="ibn"),
        pytest.param(lambda: EvoNormB0(6), 2, id="evonorm, where v * x and var + eps stay"),
    ],
)
def test_between_padded_convolutions(norm: Callable[[], nn.Module], left: int) -> None:
    """What is frozen goes into the convolution in front, gamma and beta (one per group) into the one behind."""
    convolutions = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, groups=2)
    model = randomized(nn.Sequential(convolutions[0], norm(), convolutions[1])).double()
    x = torch.randn(2, 3, 5, 6, generator=seeded(9), dtype=torch.float64)
    graph = folded(model, (x,))
    assert sum(query.is_call(node, AFFINE) for node in graph.nodes) == left
    assert distance(graph.run(x), [model(x)]) < EXACT


@pytest.mark.parametrize("deviation", Deviation)
def test_standardized_weights_are_constants(deviation: Deviation) -> None:
    convolution = StandardizedConv2d(nn.Conv2d(3, 4, 3, padding=1), deviation=deviation)
    model = randomized(nn.Sequential(convolution, nn.BatchNorm2d(4))).double()
    x = torch.randn(2, 3, 5, 6, generator=seeded(9), dtype=torch.float64)
    graph = folded(model, (x,))
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [ops.CONV2D]
    assert distance(graph.run(x), [model(x)]) < EXACT
