"""Per-channel affines through every operator of the table, both ways, checked by what the operator computes."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, Affine
from normfuse.graph.edit import editing
from normfuse.report import Reason
from normfuse.rewrite import commuting
from normfuse.rewrite.commuting import backward, forward, source_of
from normfuse.testing import seeded

ATEN = ops.ATEN
EXACT = 1e-13
WRONG = 1e-3
CONSTANT = torch.tensor([2, 0, 2])


@dataclass(frozen=True)
class Case:
    """One call on a tensor of ``shape``; a split is followed by ``getitem(part)``; some refuse more than they must."""

    target: Any
    shape: tuple[int, ...]
    args: tuple[Any, ...] = ()
    part: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    refused_axes: tuple[int, ...] = ()


def case(name: str, target: Any, shape: tuple[int, ...], *args: Any, **options: Any) -> Any:
    return pytest.param(Case(target, shape, args, **options), id=name)


AVERAGE, MAXIMUM = list(ops.AVERAGE_POOLS), list(ops.MAXIMUM_POOLS)
ADAPTIVE = list(ops.ADAPTIVE_AVERAGE_POOLS)

CASES = [
    case("permute", ops.PERMUTE, (2, 3, 5, 7), [0, 2, -1, 1]),
    case("reshape: space to tokens", ops.RESHAPE, (2, 3, 5, 7), [2, 3, 35]),
    case("reshape: tokens into the batch", ops.RESHAPE, (2, 5, 3), [10, 3]),
    case("reshape: channels into heads", ops.RESHAPE, (2, 5, 6), [2, 5, 3, 2]),
    case("reshape: heads into channels", ops.RESHAPE, (2, 5, 3, 2), [2, 5, 6]),
    case("reshape: all in one", ops.RESHAPE, (2, 3, 5), [-1]),
    case("reshape: equal sizes in another order", ops.RESHAPE, (2, 5, 3), [2, 3, 5]),
    case("reshape: a part that looks like the whole", ops.RESHAPE, (2, 4, 2), [2, 2, 2, 2]),
    case("reshape: an axis of one more", ops.RESHAPE, (2, 5, 3), [2, 1, 5, 1, 3]),
    case("reshape: windows", ops.RESHAPE, (2, 6, 4, 3), [2, 3, 2, 2, 2, 3]),
    case("select", ops.SELECT, (2, 5, 3), 1, 2),
    case("select from the end", ops.SELECT, (2, 5, 3), -1, -1),
    case("slice", ops.SLICE, (2, 5, 3), 1, 1, 4),
    case("slice with steps", ops.SLICE, (2, 5, 7), -1, 1, 9223372036854775807, 3),
    case("split", ATEN.split.Tensor, (2, 7, 5), 3, 1, part=2),
    case("split by sizes", ATEN.split_with_sizes.default, (2, 5, 7), [4, 1, 2], -1, part=0),
    case("chunk", ATEN.chunk.default, (2, 7, 5), 3, 1, part=1),
    case("unbind", ATEN.unbind.int, (2, 5, 3), 1, part=3),
    case("index_select", ops.INDEX_SELECT, (2, 3, 5), 1, CONSTANT),
    case("mean", ops.MEAN, (2, 3, 5, 7), [1]),
    case("mean of axes from the end, kept", ops.MEAN, (2, 3, 5, 7), [-1, -2], True),
    case("mean of everything", ops.MEAN, (2, 3, 5), []),
    case("roll", ops.ROLL, (2, 5, 7, 3), [-2, 3], [1, -1]),
    case("roll one axis twice", ops.ROLL, (2, 5, 3), [1, 3], [1, 1]),
    case("roll as if flat", ops.ROLL, (2, 5, 3), [4], [], refused_axes=(0, 1, 2)),
    case("flip", ops.FLIP, (2, 5, 3), [-2, 0]),
    case("expand", ops.EXPAND, (1, 5, 1), [7, 4, 5, 3]),
    case("repeat", ops.REPEAT, (2, 3, 1), [2, 3, 1, 4]),
    case("pad with zeros", ops.PAD, (2, 3, 5), [1, 2], refused_axes=(2,)),
    case("pad by reflection", ops.PAD, (2, 3, 5, 4), [1, 2, 2, 0], "reflect", refused_axes=(2, 3)),
    case("pad by replication", ops.PAD, (2, 3, 5), [1, 2], "replicate", refused_axes=(2,)),
    case("pad around", ops.PAD, (2, 3, 5), [1, 2], "circular", refused_axes=(2,)),
    *(case(f"avg_pool{n}d", AVERAGE[n - 1], (2, 3, 5, 4, 6)[: n + 2], [2] * n, [1] * n) for n in (1, 2, 3)),
    case("avg_pool2d, cut windows", AVERAGE[1], (2, 3, 5, 7), [2, 3], [2, 2], [0, 0], True),
    case("avg_pool2d, padding not counted", AVERAGE[1], (2, 3, 5, 7), [3, 3], [2, 1], [1, 1], False, False),
    case("avg_pool2d, unbatched", AVERAGE[1], (3, 5, 7), [2, 2]),
    *(case(f"adaptive_avg_pool{n}d", ADAPTIVE[n - 1], (2, 3, 5, 4, 7)[: n + 2], [2] * n) for n in (1, 2, 3)),
    *(case(f"max_pool{n}d", MAXIMUM[n - 1], (2, 3, 5, 4, 6)[: n + 2], [2] * n, [1] * n, [1] * n) for n in (1, 2, 3)),
    case("relu", ops.RELU, (2, 3, 5)),
    case("nearest 1d", ATEN.upsample_nearest1d.vec, (2, 3, 5), [7], None, refused_axes=(2,)),
    case("nearest 2d", ATEN.upsample_nearest2d.vec, (2, 3, 5, 4), None, [2.0, 1.5], refused_axes=(2, 3)),
    case("nearest 3d", ATEN.upsample_nearest3d.vec, (2, 3, 2, 4, 5), [3, 4, 7], None, refused_axes=(2, 3, 4)),
    case("nearest exact", ATEN._upsample_nearest_exact2d.vec, (2, 3, 5, 4), [7, 3], None, refused_axes=(2, 3)),
    case("linear", ATEN.upsample_linear1d.vec, (2, 3, 5), [7], False, None),
    case("bilinear", ATEN.upsample_bilinear2d.vec, (2, 3, 5, 4), [7, 9], True, None),
    case("bilinear, smaller", ATEN.upsample_bilinear2d.vec, (2, 3, 5, 4), [2, 3], False, None),
    case("trilinear", ATEN.upsample_trilinear3d.vec, (2, 3, 2, 4, 5), [3, 5, 7], False, None),
    case("bicubic", ATEN.upsample_bicubic2d.vec, (2, 3, 5, 4), [7, 9], False, None),
]


def built(case: Case) -> tuple[Graph, fx.Node]:
    """Return a graph of one input and the call."""
    trace = fx.Graph()
    x = trace.placeholder("x")
    x.meta["val"] = FakeTensorMode().from_tensor(torch.empty(case.shape, dtype=torch.float64))
    output = trace.output((x,))
    graph = Graph(fx.GraphModule(nn.Module(), trace), ("x",), ("y",))
    with editing(graph) as edit:
        args = [edit.constant(value, "c") if isinstance(value, Tensor) else value for value in case.args]
        node = edit.call(case.target, x, *args, at=output, **case.kwargs)
        if case.part is not None:
            node = edit.call(ops.GETITEM, node, case.part, at=output)
        output.args = ((node,),)
    return graph, node


def sample(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def drawn(size: int, axis: int, node: fx.Node, *, seed: int = 1) -> Affine:
    """Return an affine that the operator's own conditions on its numbers let through."""
    scale, shift = sample((2, size), seed=seed)
    if node.target in (*ops.MAXIMUM_POOLS, ops.RELU):
        scale = scale.abs()
    if node.target is ops.RELU:
        shift = torch.zeros_like(shift)
    if node.target is ops.PAD and query.argument(node, 2, "mode", "constant") == "constant":
        shift = torch.zeros_like(shift)
    return Affine(scale, shift, axis)


def apply(found: Affine, x: Tensor) -> Tensor:
    result: Tensor = AFFINE(x, found.scale, found.shift, found.axis)
    return result


def commutes(graph: Graph, before: Affine, behind: Affine, shape: tuple[int, ...]) -> bool:
    x = sample(shape)
    (ours,), (true,) = graph.run(apply(before, x)), graph.run(x)
    return torch.allclose(ours, apply(behind, true), rtol=EXACT, atol=EXACT)


def has_an_affine_behind(graph: Graph, before: Affine, shape: tuple[int, ...]) -> bool:
    """Return whether some affine along one axis of the output is right, from the numbers alone."""
    zero, x, y = torch.zeros(shape, dtype=torch.float64), sample(shape), sample(shape, seed=2)
    ends = [graph.run(apply(before, value))[0] for value in (zero, x, y)]
    plain = [graph.run(value)[0] for value in (x, y)]
    shift, scales = ends[0], [(end - ends[0]) / given for end, given in zip(ends[1:], plain, strict=True)]
    if not torch.allclose(*scales, rtol=1e-6, atol=1e-9):
        return False
    return any(_varies_along(axis, shift) and _varies_along(axis, scales[0]) for axis in range(shift.ndim))


def _varies_along(axis: int, tensor: Tensor) -> bool:
    rows = tensor.movedim(axis, 0).flatten(1)
    return torch.allclose(rows, rows[:, :1].expand_as(rows), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_forward_is_what_the_operator_does(case: Case) -> None:
    graph, node = built(case)
    for axis, size in enumerate(case.shape):
        before = drawn(size, axis, node)
        found = forward(graph, node, before)
        if isinstance(found, Affine):
            assert commutes(graph, before, found, case.shape)
        else:
            assert found is Reason.AXIS
            assert axis in case.refused_axes or not has_an_affine_behind(graph, before, case.shape)


@pytest.mark.parametrize("case", CASES)
def test_backward_finds_what_forward_gives(case: Case) -> None:
    graph, node = built(case)
    for axis, size in enumerate(case.shape):
        behind = forward(graph, node, drawn(size, axis, node))
        if isinstance(behind, Affine):
            before = backward(graph, node, behind)
            assert isinstance(before, Affine)
            assert commutes(graph, before, behind, case.shape)


@pytest.mark.parametrize("case", CASES)
def test_backward_is_right_wherever_it_answers(case: Case) -> None:
    graph, node = built(case)
    answers = 0
    for axis in range(query.rank(node)):
        wanted = drawn(int(query.shape(node)[axis]), axis, node)
        found = backward(graph, node, wanted)
        if isinstance(found, Affine):
            assert commutes(graph, found, wanted, case.shape)
            answers += 1
        else:
            assert found is Reason.AXIS
    assert answers or query.rank(node) < 2 or node.target is ops.ROLL


@pytest.mark.parametrize("case", CASES)
def test_one_affine_for_all_channels_goes_through_everything(case: Case) -> None:
    graph, node = built(case)
    uniform = drawn(1, 0, node)
    for found in (forward(graph, node, uniform), backward(graph, node, uniform)):
        assert isinstance(found, Affine)
        assert commutes(graph, found, uniform, case.shape)


def test_every_operator_of_the_table_has_a_case() -> None:
    cases = {param.values[0].target for param in CASES}
    assert set(commuting._WIRINGS) - {ops.GETITEM} <= cases
    assert {ATEN.unbind.int, *ops.SPLITS} <= cases


REFUSALS = [
    case("zeros padded", ops.PAD, (2, 3, 5), [1, 2]),
    case("another number padded", ops.PAD, (2, 3, 5), [1, 2], "constant", 0.5),
    *(case(f"max_pool{n}d", MAXIMUM[n - 1], (2, 3, 5, 4, 6)[: n + 2], [2] * n) for n in (1, 2, 3)),
    *(
        case(f"avg_pool{n}d, padding counted", AVERAGE[n - 1], (2, 3, 5, 4, 6)[: n + 2], [3] * n, [1] * n, [1] * n)
        for n in (1, 2, 3)
    ),
    case("avg_pool2d with its own divisor", AVERAGE[1], (2, 3, 5, 4), [2, 2], [1, 1], [0, 0], False, True, 3),
    case("avg_pool3d with its own divisor", AVERAGE[2], (2, 3, 5, 4, 6), [2] * 3, [1] * 3, [0] * 3, False, True, 3),
    case("relu", ops.RELU, (2, 3, 5)),
]
REASONS = [
    *(Reason.ZERO_PADDING, Reason.PADDED_VALUE),
    *3 * [Reason.NEGATIVE_SCALE],
    *5 * [Reason.ZERO_PADDING],
    Reason.NONLINEAR_READER,
]


@pytest.mark.parametrize(
    ("case", "reason"),
    [pytest.param(*p.values, reason, id=p.id) for p, reason in zip(REFUSALS, REASONS, strict=True)],
)
def test_refusals(case: Case, reason: Reason) -> None:
    """The same affine behind as before is the naive answer; it is far from right."""
    graph, node = built(case)
    wanted = Affine(torch.tensor([-2.0, 0.5, -1.0]).double(), torch.tensor([1.0, 0.0, -0.5]).double(), 1)
    assert forward(graph, node, wanted) is reason
    assert backward(graph, node, wanted) is reason
    x = sample(case.shape)
    (ours,), (true,) = graph.run(apply(wanted, x)), graph.run(x)
    assert float((ours - apply(wanted, true)).abs().max()) > WRONG


@pytest.mark.parametrize(("scale", "shift"), [(-1.0, 0.0), (2.0, 0.5), (2.0, -0.5)])
def test_relu_passes_neither_a_negative_scale_nor_a_shift(scale: float, shift: float) -> None:
    graph, node = built(Case(ops.RELU, (2, 3, 5)))
    found = Affine(torch.tensor([1.0, scale, 1.0]).double(), torch.tensor([0.0, shift, 0.0]).double(), 1)
    assert forward(graph, node, found) is backward(graph, node, found) is Reason.NONLINEAR_READER


def test_the_channels_of_every_head_are_channels_in_front_of_the_cut() -> None:
    graph, node = built(Case(ops.RESHAPE, (2, 5, 6), ([2, 5, 3, 2],)))
    wanted = Affine(torch.tensor([2.0, 3.0]).double(), torch.tensor([0.0, 1.0]).double(), 3)
    found = backward(graph, node, wanted)
    assert isinstance(found, Affine)
    assert (found.scale.tolist(), found.shift.tolist(), found.axis) == ([2, 3] * 3, [0, 1] * 3, 2)
    assert commutes(graph, found, wanted, (2, 5, 6))


def test_what_a_conflict_makes_impossible_is_refused() -> None:
    graph, node = built(Case(ops.INDEX_SELECT, (2, 3, 5), (1, CONSTANT)))  # channel 2 arrives twice
    scale = torch.tensor([2.0, 1.0, 3.0]).double()
    assert backward(graph, node, Affine(scale, torch.zeros(3).double(), 1)) is Reason.AXIS


def test_channels_that_are_left_out_keep_the_identity() -> None:
    graph, node = built(Case(ops.SLICE, (2, 5, 3), (1, 1, 3)))
    found = backward(graph, node, Affine(torch.tensor([2.0, 3.0]).double(), torch.tensor([4.0, 5.0]).double(), 1))
    assert isinstance(found, Affine)
    assert found.scale.tolist() == [1, 2, 3, 1, 1]
    assert found.shift.tolist() == [0, 4, 5, 0, 0]


def test_one_channel_that_is_cut_out_leaves_the_others_alone() -> None:
    graph, node = built(Case(ops.SLICE, (2, 5, 3), (2, 1, 2)))
    found = backward(graph, node, Affine(torch.tensor([2.0]).double(), torch.tensor([4.0]).double(), 2))
    assert isinstance(found, Affine)
    assert (found.scale.tolist(), found.shift.tolist(), found.axis) == ([1, 2, 1], [0, 4, 0], 2)


def test_positions_that_are_computed_are_not_followed() -> None:
    graph, node = built(Case(ops.INDEX_SELECT, (2, 3, 5), (1, CONSTANT)))
    with editing(graph) as edit:
        edit.set_argument(node, 2, edit.call(ops.ATEN.flip.default, node.args[2], [0], at=node))
    assert isinstance(forward(graph, node, drawn(5, 2, node)), Affine)
    assert forward(graph, node, drawn(3, 1, node)) is Reason.AXIS


@pytest.mark.parametrize("target", [ops.GELU, ops.SOFTMAX, ops.MATMUL, ops.ADD, ops.CAT, ops.LINEAR])
def test_operators_outside_the_table_move_nothing(target: Any) -> None:
    args: dict[Any, tuple[Any, ...]] = {ops.GELU: (), ops.SOFTMAX: (-1,)}
    trace = fx.Graph()
    x = trace.placeholder("x")
    assert source_of(trace.create_node("call_function", target, (x, *args.get(target, (x,))))) is None
    assert source_of(trace.create_node("call_function", ops.GETITEM, (x, 0))) is None
