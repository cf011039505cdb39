"""What is constant in a norm is an affine, and nothing else of it (`NORM_RULES`)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE, Affine, read_affine
from normfuse.nn import PRepBN
from normfuse.passes.presets import CANONICAL
from normfuse.pipeline import Pipeline
from normfuse.report import PassReport, Reason
from normfuse.rewrite import apply_rules
from normfuse.rewrite.norms import NORM_RULES
from normfuse.testing import Small, distance, randomized, sample

EXACT = 1e-12


def applied(model: nn.Module, x: Tensor) -> tuple[Graph, PassReport]:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL,)).run(graph)
    return graph, apply_rules(graph, NORM_RULES, name="norms")


def affines(graph: Graph) -> list[Affine]:
    return [read_affine(graph, node) for node in graph.nodes if query.is_call(node, AFFINE)]


NORMS = [
    pytest.param(nn.BatchNorm1d(5), (4, 5, 3), 1, None, id="batch norm"),
    pytest.param(nn.BatchNorm2d(5, affine=False, eps=0.1), (4, 5, 3, 2), 1, None, id="without gamma and beta"),
    pytest.param(nn.BatchNorm1d(5), (4, 5), 1, None, id="of samples without positions"),
    pytest.param(
        nn.InstanceNorm2d(5, affine=True, track_running_stats=True), (4, 5, 3, 2), 1, None, id="frozen instance norm"
    ),
    pytest.param(nn.InstanceNorm1d(5, track_running_stats=True), (4, 5, 3), 1, None, id="frozen, without gamma"),
    pytest.param(nn.InstanceNorm1d(5, affine=True), (4, 5, 3), 1, ops.INSTANCE_NORM, id="instance norm"),
    pytest.param(nn.GroupNorm(3, 6), (4, 6, 5, 2), 1, ops.GROUP_NORM, id="group norm"),
    pytest.param(nn.GroupNorm(1, 3), (4, 3, 5), 1, ops.GROUP_NORM, id="of one group"),
    pytest.param(nn.LayerNorm(5), (4, 3, 5), 2, ops.LAYER_NORM, id="layer norm"),
    pytest.param(nn.LayerNorm(5, bias=False), (4, 3, 5), 2, ops.LAYER_NORM, id="layer norm without beta"),
    pytest.param(nn.RMSNorm(5, eps=0.1), (4, 3, 2, 5), 3, ops.RMS_NORM, id="rms norm"),
]


@pytest.mark.parametrize(("norm", "shape", "axis", "stays"), NORMS)
def test_one_affine_along_the_channels(norm: nn.Module, shape: tuple[int, ...], axis: int, stays: Any) -> None:
    model, x = randomized(norm).double(), sample(*shape)
    graph, report = applied(model, x)
    assert report.changed
    (found,) = affines(graph)
    assert (found.axis, found.scale.numel()) == (axis, shape[axis])
    left = [node for node in graph.nodes if query.is_call(node, *ops.ONLINE_NORMS, ops.BATCH_NORM)]
    assert [node.target for node in left] == ([] if stays is None else [stays])
    assert all(query.argument(node, index, name) is None for node in left for index, name in bare(node.target))
    assert distance(graph.run(x), [model(x)]) < EXACT


def bare(target: Any) -> list[tuple[int, str]]:
    return list(zip(ops.ONLINE_NORMS[target], ("weight", "bias"), strict=False))


LEFT = [
    pytest.param(lambda m, x: nn.functional.layer_norm(x, (3, 5), m.square, m.square), id="over two axes"),
    pytest.param(lambda m, x: nn.functional.layer_norm(x, (5,), x[0, 0]), id="a computed gamma"),
    pytest.param(lambda m, x: nn.functional.rms_norm(x, (5,), x[0, 0]), id="a computed gamma of an rms norm"),
    pytest.param(lambda m, x: nn.functional.layer_norm(x, (5,)), id="no gamma and beta"),
    pytest.param(lambda m, x: nn.functional.group_norm(x, 1), id="none of a group norm"),
]


@pytest.mark.parametrize("function", LEFT)
def test_left_alone(function: Any) -> None:
    model, x = Small(function, square=sample(3, 5)), sample(4, 3, 5)
    graph, report = applied(model, x)
    assert not report.changed
    assert affines(graph) == []
    assert distance(graph.run(x), [model(x)]) < EXACT


def dead(dtype: torch.dtype) -> nn.Module:
    norm = nn.BatchNorm1d(5, eps=1e-12)
    assert isinstance(norm.running_var, Tensor)
    norm.running_var.zero_()
    return norm.eval().to(dtype)


def test_a_replacement_that_has_not_ended_is_refused() -> None:
    model, x = randomized(PRepBN(5, total_step=7)).double(), sample(4, 3, 5)
    _, report = applied(model, x)
    assert [refusal.reason for refusal in report.refused] == [Reason.PROGRESSION]
    assert "7 training forwards are left" in report.refused[0].detail


@pytest.mark.parametrize(("dtype", "refused"), [(torch.float16, [Reason.OVERFLOW]), (torch.float32, [])])
def test_a_scale_that_its_type_cannot_hold_is_refused(dtype: torch.dtype, refused: list[Reason]) -> None:
    graph, report = applied(dead(dtype), sample(4, 5).to(dtype))
    assert [refusal.reason for refusal in report.refused] == refused
    assert len(affines(graph)) == 1 - len(refused)


def test_statistics_of_the_input_are_refused() -> None:
    model = Small(lambda m, x: nn.functional.batch_norm(x, x.mean((0, 2)), m.v), v=torch.ones(3).double())
    graph, report = applied(model, x := sample(4, 3, 5))
    assert [refusal.reason for refusal in report.refused] == [Reason.NOT_CONSTANT]
    assert distance(graph.run(x), [model(x)]) < EXACT
