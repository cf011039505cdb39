"""Padded and transposed convolutions behind an affine: the naive fold is wrong at the border, every repair is right."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE, Affine
from normfuse.graph.edit import editing
from normfuse.report import Reason
from normfuse.rewrite import padding_repair
from normfuse.rewrite.linear_map import LINEAR_MAPS, LinearMap, read_linear_map, rebind
from normfuse.rewrite.padding_repair import NOTHING, Repair, choose_repair
from normfuse.testing import randomized, seeded

EXACT, WRONG = 1e-10, 1e-3


def sample(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def drawn(linear: LinearMap) -> Affine:
    return Affine(*sample(2, linear.inputs, seed=4), linear.input_axis)


def ready(conv: nn.Module, x: Tensor, *, sizes: bool = False) -> tuple[Graph, fx.Node, LinearMap]:
    """Return the graph of a convolution, its node and its map; with ``sizes`` no size of ``x`` is known."""
    program: Any = randomized(conv).double()
    if sizes:
        auto = torch.export.Dim.AUTO
        program = torch.export.export(
            program, (x,), dynamic_shapes=({axis: auto for axis in range(x.ndim) if axis != 1},)
        )
    graph = capture(program) if sizes else capture(program, (x,))
    (node,) = [node for node in graph.nodes if query.is_call(node, *LINEAR_MAPS)]
    linear = read_linear_map(graph, node)
    assert linear is not None
    return graph, node, linear


def fold(graph: Graph, node: fx.Node, linear: LinearMap, found: Affine, repair: Repair) -> None:
    with editing(graph) as edit:
        rebind(edit, node, linear.before(found))
        repair.write(edit, node)


def apply(found: Affine, x: Tensor) -> Tensor:
    result: Tensor = AFFINE(x, found.scale, found.shift, found.axis)
    return result


CONVS: list[Any] = [
    pytest.param(nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7), id="conv1d"),
    pytest.param(nn.Conv1d(3, 4, 3, padding=2, dilation=2, stride=2), (2, 3, 9), id="dilated, strided"),
    pytest.param(nn.Conv2d(3, 4, 3, padding=1, bias=False), (2, 3, 6, 5), id="conv2d"),
    pytest.param(nn.Conv2d(3, 4, (3, 2), padding=(2, 0)), (2, 3, 6, 5), id="padded along one axis"),
    pytest.param(nn.Conv2d(3, 4, 1, padding=1), (2, 3, 6, 5), id="1x1 with padding"),
    pytest.param(nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 5), id="grouped"),
    pytest.param(nn.Conv2d(5, 5, 3, padding=1, groups=5), (2, 5, 6, 4), id="depthwise"),
    pytest.param(nn.Conv3d(2, 3, 3, padding=(0, 1, 1)), (2, 2, 4, 3, 5), id="conv3d"),
]
TRANSPOSED: list[Any] = [
    pytest.param(nn.ConvTranspose1d(3, 4, 3), (2, 3, 5), id="transposed 1d"),
    pytest.param(nn.ConvTranspose2d(3, 4, 2, stride=3), (2, 3, 4, 5), id="transposed, gaps between taps"),
    pytest.param(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 4, 5), id="grouped"
    ),
    pytest.param(nn.ConvTranspose3d(2, 3, 2, bias=False), (2, 2, 3, 2, 4), id="transposed 3d"),
]


@pytest.mark.parametrize(("conv", "shape"), [*CONVS, *TRANSPOSED])
def test_the_border_map(conv: nn.Module, shape: tuple[int, ...]) -> None:
    x = sample(*shape)
    graph, node, linear = ready(conv, x)
    found = drawn(linear)
    true, naive = graph.run(apply(found, x))[0], graph.copy()
    (copied,) = [other for other in naive.nodes if query.is_call(other, *LINEAR_MAPS)]
    fold(naive, copied, linear, found, NOTHING)
    assert float((naive.run(x)[0] - true).abs().max()) > WRONG

    border = padding_repair._border(node, linear, found)
    assert border is not None
    fold(graph, node, linear, found, Repair(border=border))
    assert float((graph.run(x)[0] - true).abs().max()) < EXACT


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("conv", "shape"), CONVS)
def test_padding_with_a_value(conv: nn.Module, shape: tuple[int, ...], uniform: bool) -> None:
    x = sample(*shape)
    graph, node, linear = ready(conv, x)
    found = Affine(*sample(2, 1, seed=4), linear.input_axis) if uniform else drawn(linear)
    true = graph.run(apply(found, x))[0]
    values = padding_repair._values(linear, found, torch.float64)
    assert values is not None
    fold(graph, node, linear, found, Repair(values=values, amounts=tuple(padding_repair._amounts(node, linear))))
    assert any(query.is_call(other, ops.PAD) for other in graph.nodes) == uniform
    assert float((graph.run(x)[0] - true).abs().max()) < EXACT


def test_only_the_border_is_touched() -> None:
    x = sample(2, 3, 7, 6)
    graph, node, linear = ready(nn.Conv2d(3, 4, 3, padding=1), x)
    found = drawn(linear)
    true = graph.run(apply(found, x))[0]
    border = padding_repair._border(node, linear, found)
    assert border is not None
    assert float(border[..., 1:-1, 1:-1].abs().max()) < EXACT
    fold(graph, node, linear, found, NOTHING)
    error = (graph.run(x)[0] - true).abs()
    assert float(error[..., 1:-1, 1:-1].max()) < EXACT
    assert (
        min(float(rows.max()) for rows in (error[..., 0, :], error[..., -1, :], error[..., 0], error[..., -1])) > WRONG
    )


@pytest.mark.parametrize(
    ("conv", "scale", "shift"),
    [
        pytest.param(nn.Conv1d(3, 4, 3, padding=1), 2.0, 0.0, id="no shift"),
        pytest.param(nn.Conv1d(3, 4, 3), 2.0, 1.0, id="no padding"),
        pytest.param(nn.Conv1d(3, 4, 3, padding=1, groups=1), 0.0, 0.0, id="nothing at all"),
        pytest.param(nn.ConvTranspose1d(3, 4, 3), 2.0, 0.0, id="transposed, no shift"),
    ],
)
def test_nothing_is_repaired_where_nothing_is_missing(conv: nn.Module, scale: float, shift: float) -> None:
    graph, node, linear = ready(conv, sample(2, 3, 7))
    found = Affine(torch.full((3,), scale).double(), torch.full((3,), shift).double(), 1)
    assert choose_repair(graph, node, linear, found) is NOTHING


@pytest.mark.parametrize(("kind", "reason"), [(nn.Conv2d, None), (nn.ConvTranspose2d, Reason.TRANSPOSED)])
def test_sizes_that_are_not_known_leave_the_padding_only(kind: Any, reason: Reason | None) -> None:
    x = sample(2, 3, 7, 6)
    graph, node, linear = ready(kind(3, 4, 3, padding=1), x, sizes=True)
    found = drawn(linear)
    repair = choose_repair(graph, node, linear, found)
    if reason is not None:
        assert repair is reason
        return
    assert isinstance(repair, Repair)
    assert repair.values is not None
    expected = [graph.run(apply(found, image))[0] for image in (x, sample(3, 3, 4, 9))]
    fold(graph, node, linear, found, repair)
    for image, true in zip((x, sample(3, 3, 4, 9)), expected, strict=True):
        assert float((graph.run(image)[0] - true).abs().max()) < EXACT


def test_a_dead_channel_is_never_divided_by() -> None:
    graph, node, linear = ready(nn.Conv2d(3, 4, 3, padding=1), sample(2, 3, 7, 6), sizes=True)
    found = drawn(linear)
    found.scale[1] = 0.0
    assert choose_repair(graph, node, linear, found) is Reason.ZERO_PADDING
    found.shift[1] = 0.0  # without a shift it pads with zero, as it did
    repair = choose_repair(graph, node, linear, found)
    assert isinstance(repair, Repair)
    assert repair.values is not None
    assert float(repair.values[1]) == 0.0


@pytest.mark.parametrize(
    ("conv", "wanted"),
    [
        pytest.param(nn.Conv2d(3, 4, 3, padding=1), "border", id="as many channels behind"),
        pytest.param(nn.Conv2d(3, 64, 3, padding=1), "padded", id="many channels behind"),
    ],
)
def test_the_repair_that_moves_less_is_taken(conv: nn.Module, wanted: str) -> None:
    graph, node, linear = ready(conv, sample(2, 3, 7, 6))
    repair = choose_repair(graph, node, linear, drawn(linear))
    assert isinstance(repair, Repair)
    assert wanted in repair.how


def test_a_border_map_that_is_too_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding_repair, "LARGEST_MAP", 10)
    graph, node, linear = ready(nn.ConvTranspose1d(3, 4, 3), sample(2, 3, 7))
    assert choose_repair(graph, node, linear, drawn(linear)) is Reason.TRANSPOSED
    graph, node, linear = ready(nn.Conv1d(3, 4, 3, padding=1), sample(2, 3, 7))
    repair = choose_repair(graph, node, linear, drawn(linear))
    assert isinstance(repair, Repair)
    assert repair.values is not None


def test_a_border_map_that_a_type_cannot_hold_does_not_fit() -> None:
    assert NOTHING.fits(torch.float16)
    assert Repair(border=torch.tensor([7e4]).double()).fits(torch.bfloat16)
    assert not Repair(border=torch.tensor([7e4]).double()).fits(torch.float16)


def test_an_affine_behind_the_convolution_scales_its_border() -> None:
    border = sample(1, 4, 3, 2)
    behind = Affine(*sample(2, 4, seed=1), 1)
    scaled = Repair(border=border).scaled(behind, 1)
    assert scaled.border is not None
    torch.testing.assert_close(scaled.border, border * behind.scale.reshape(1, 4, 1, 1))
    assert NOTHING.scaled(behind, 1) is NOTHING
