"""Tables are codes in the graph and in the file, and every number is within half a step of what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import BadInput
from normfuse.export.onnx import export_onnx
from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture, query
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.quantize_tables import QuantizeTables
from normfuse.quant import IntegerType
from normfuse.runtime.onnx_session import open_onnx
from normfuse.testing import Golden, Small, check_pass_contract, picture, randomized, seeded


def text(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids) + m.positions
    result: Tensor = m.head(torch.tanh(x))
    return result


def model() -> nn.Module:
    parts: dict[str, Any] = {
        "words": nn.Embedding(50, 24),
        "positions": torch.randn(1, 43, 24, generator=seeded(2)) * 3,
    }
    return randomized(Small(text, **parts, head=nn.Linear(24, 5)))


def ids(count: int) -> Tensor:
    return torch.randint(0, 50, (count, 43), generator=seeded(1))


def quantized(module: nn.Module, x: Tensor) -> tuple[Graph, Any]:
    graph = capture(module, (x,))
    return graph, QuantizeTables().run(graph)


def constants(graph: Graph) -> dict[str, torch.dtype]:
    return {str(node.target): query.dtype(node) for node in graph.nodes if query.is_constant(node)}


def test_picture(golden: Golden) -> None:
    graph = capture(model(), (ids(2),))
    before = graph.text()
    assert QuantizeTables().run(graph).applied == {"lookup": 1, "sum": 1}
    assert picture(before, graph.text()) == golden


def test_contract() -> None:
    assert check_pass_contract(QuantizeTables(), capture(model(), (ids(2),)), (ids(3),)).changed


def test_every_number_moves_by_half_a_step_at_most() -> None:
    torch_model, x = model(), ids(3)
    seen = dict[str, Tensor]()

    def watch(node: Any, value: Any) -> Any:
        if query.shape(node)[-1:] == [24] or query.shape(node)[-1:] == (24,):
            seen[node.name] = value
        return value

    graph, _ = quantized(torch_model, x)
    graph.run_watched((x,), watch)
    words = torch_model.words(x).detach()  # type: ignore[operator]
    step = torch_model.words.weight.detach().abs().amax(0) / 127  # type: ignore[union-attr, operator]
    found = next(value for name, value in seen.items() if name.startswith("embedding") and value.is_floating_point())
    assert ((found - words).abs() <= 0.5001 * step).all()
    assert ((found - words).abs() > 0).any()
    table = torch_model.positions.detach()  # type: ignore[operator]
    (added,) = [value for value in seen.values() if value.shape == (1, 43, 24) and value.is_floating_point()]
    assert ((added - table).abs() <= 0.5001 * table.abs().amax(-1, keepdim=True) / 127).all()


def test_the_file_holds_codes_and_the_engine_computes_the_graph(tmp_path: Path) -> None:
    x = ids(3)
    graph, _ = quantized(model(), x)
    export_onnx(graph, tmp_path / "model.onnx")
    held = {tuple(each.dims): each.data_type for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert held[50, 24] == held[43, 24] == onnx.TensorProto.INT8
    session = open_onnx(tmp_path / "model.onnx", threads=1)
    (found,) = session.run({session.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(found, graph.run(x)[0].numpy(), rtol=0, atol=1e-5)


FOUR = IntegerType(4, signed=True)


def test_four_bits_look_groups_up(tmp_path: Path) -> None:
    """The engine's lookup in packed codes and the graph's give the same numbers, for indices of every shape."""
    parts: dict[str, Any] = {
        "words": nn.Embedding(51, 96),
        "positions": torch.randn(1, 43, 96, generator=seeded(2)) * torch.logspace(-3, 3, 43)[:, None],
    }
    module = Small(lambda m, ids: m.words(ids) + m.positions, **parts)
    x = ids(3)
    graph = capture(module, (x,))
    assert QuantizeTables(type=FOUR).run(graph).applied == {"grouped lookup": 1, "grouped sum": 1}
    assert PlaceQuantizers(placement=X86_VNNI).run(graph).refused == ()
    export_onnx(graph, path := tmp_path / "model.onnx")
    held = {tuple(each.dims): each.data_type for each in onnx.load(path).graph.initializer}
    assert held[51, 96] == held[43 * 3, 32] == onnx.TensorProto.INT4
    assert path.stat().st_size < 96 * (51 + 43) * 5 / 8 + 4000
    session = open_onnx(path, threads=1)
    for some in (x, ids(1), torch.full((2, 43), 50), torch.zeros(1, 43, dtype=torch.int64)):
        (found,) = session.run({session.inputs[0].name: some.numpy()}).values()
        np.testing.assert_array_equal(found, graph.run(some)[0].numpy())
    for wrong in (51, -52, 10**7):
        with pytest.raises(BadInput, match="out of data bounds"):
            session.run({session.inputs[0].name: torch.full((1, 43), wrong).numpy()})
    words, positions = module.words(x).detach(), module.positions.detach()  # type: ignore[operator, union-attr]
    error = (graph.run(x)[0] - (words + positions)).unflatten(-1, (3, 32)).norm(dim=-1)
    largest = sum(table.unflatten(-1, (3, 32)).abs().amax(-1) for table in (words, positions))
    assert (error <= 32**0.5 * 1.001 * largest / 14).all(), "half a step of 7 to the largest of a group"
    assert (error > 0).all()


def test_four_bits_are_nearer_than_the_largest_magnitude_would_be() -> None:
    """One outlier per group: ends of ranges are chosen by squared error."""
    weight = torch.randn(64, 64, generator=seeded(4))
    weight[:, ::32] *= 4
    graph = capture(Small(lambda m, ids: m.words(ids), words=nn.Embedding(64, 64, _weight=weight)), (ids(2),))
    QuantizeTables(type=FOUR).run(graph)
    every = torch.arange(43).expand(2, 43)
    step = weight.reshape(64, 2, 32).abs().amax(-1, keepdim=True) / 7
    plain = ((weight.reshape(64, 2, 32) / step).round() * step).reshape(64, 64)
    squares = [(table[:43] - weight[:43]).square().sum() for table in (graph.run(every)[0][0], plain)]
    assert squares[0] < 0.9 * squares[1]


@pytest.mark.parametrize(("channels", "rules"), [(24, {"lookup": 1}), (48, {"grouped lookup": 1})])
def test_rows_that_groups_do_not_divide_have_eight_bits(channels: int, rules: dict[str, int]) -> None:
    graph = capture(Small(lambda m, ids: m.words(ids), words=nn.Embedding(50, channels)), (ids(2),))
    assert QuantizeTables(type=FOUR).run(graph).applied == rules


def mask() -> Tensor:
    return torch.full((43, 43), -3e38).triu(1)


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (lambda m, ids: m.words(ids) + m.words.weight[:43] * 2.0, {"words": nn.Embedding(50, 24)}),
        (lambda m, ids: ids[:, :, None] * 1.0 @ m.mask[:1] + m.mask, {"mask": mask()}),
        (lambda m, ids: m.words(ids), {"words": nn.Embedding(50, 20)}),
        (lambda m, ids: ids[..., None] + m.wide, {"wide": torch.randn(43, 43).double()}),
        (lambda m, ids: (ids[..., None] * m.gain).relu(), {"gain": torch.randn(43, 43)}),
    ],
    ids=["two kinds of readers", "mask", "small", "another type", "factor"],
)
def test_what_stays_float(function: Any, parts: dict[str, Any]) -> None:
    graph = capture(Small(function, **parts), (ids(2),))
    before = constants(graph)
    report = QuantizeTables().run(graph)
    assert not report.changed
    assert constants(graph) == before


def test_a_table_of_zeros_stays_zeros() -> None:
    graph, report = quantized(
        Small(lambda m, ids: m.words(ids), words=nn.Embedding(50, 24, _weight=torch.zeros(50, 24))), ids(2)
    )
    assert report.changed
    assert not graph.run(ids(2))[0].any()


def test_what_comes_of_tables_is_no_unknown_operator() -> None:
    graph, _ = quantized(model(), ids(2))
    assert PlaceQuantizers(placement=X86_VNNI).run(graph).refused == ()
