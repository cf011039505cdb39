"""The tools for pass authors notice what they are there to notice."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import CheckFailed, InternalError
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.edit import Editor, editing
from normfuse.nn import RepBN
from normfuse.pipeline import Pass
from normfuse.report import PassReport, Reason
from normfuse.testing import (
    Golden,
    Small,
    check_pass_contract,
    distance,
    fold_tolerance,
    picture,
    randomized,
    seeded,
)

X = torch.randn(4, 5, generator=seeded(0))


def small_graph() -> Graph:
    return capture(nn.Sequential(nn.Linear(5, 3), nn.ReLU()), (X,))


def relu_of(graph: Graph) -> "torch.fx.Node":
    return next(node for node in graph.nodes if query.is_call(node, ops.RELU, ops.GELU))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong(Pass):
    """Breaks the promise it is told to break."""

    how: str = "nothing"
    name: ClassVar[str] = "wrong"

    def run(self, graph: Graph) -> PassReport:
        getattr(self, f"_{self.how}")(graph)
        return PassReport(name="other" if self.how == "other_name" else self.name, applied={})

    def _nothing(self, graph: Graph) -> None:
        pass

    _other_name = _nothing

    def _silent(self, graph: Graph) -> None:
        with editing(graph) as edit:
            if query.is_call(node := relu_of(graph), ops.RELU):
                edit.replace(node, ops.GELU, node.args[0])

    def _renaming(self, graph: Graph) -> None:
        graph.output_names = ("renamed",)

    def _writing(self, graph: Graph) -> None:
        for tensor in graph.module.buffers():
            tensor += 1

    def _breaking(self, graph: Graph) -> None:
        relu_of(graph).target = ops.ATEN.relu_.default


@dataclass(frozen=True, slots=True, kw_only=True)
class Endless(Pass):
    """Adds an operator in every run."""

    name: ClassVar[str] = "endless"

    def run(self, graph: Graph) -> PassReport:
        with editing(graph) as edit:
            edit.redirect(node := relu_of(graph), edit.call(ops.NEG, node, at=node, after=True))
        return PassReport(name=self.name, applied={"more": 1})


def test_a_pass_that_changes_nothing_keeps_the_contract() -> None:
    assert not check_pass_contract(Wrong(), small_graph(), (X,)).changed


@pytest.mark.parametrize(
    ("step", "message"),
    [
        pytest.param(Wrong(how="other_name"), "its report is called other", id="name"),
        pytest.param(Wrong(how="silent"), "report.changed is False", id="dishonest"),
        pytest.param(Wrong(how="renaming"), "changed their names", id="renamed"),
        pytest.param(Wrong(how="writing"), "a constant of the original was changed", id="wrote to a constant"),
        pytest.param(Endless(), "a second run still applies", id="endless"),
    ],
)
def test_a_broken_contract_is_named(step: Pass, message: str) -> None:
    with pytest.raises(CheckFailed, match=message) as caught:
        check_pass_contract(step, small_graph(), (X,))
    assert f"pass {step.name} breaks its contract" in caught.value.what


def test_a_broken_graph_is_named() -> None:
    with pytest.raises(InternalError, match="not functional"):
        check_pass_contract(Wrong(how="breaking"), small_graph(), (X,))


def test_distance_is_relative_to_each_outputs_scale() -> None:
    large, small = torch.tensor([1e6, -2e6]), torch.tensor([1e-3, 0.0])
    assert distance([large, small + torch.tensor([0.0, 1e-4])], [large, small]) == pytest.approx(0.1)
    assert distance([large], [large]) == 0
    assert distance([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert distance([torch.tensor([float("inf"), 1.0])], [torch.tensor([float("inf"), 1.0])]) == 0


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param([torch.ones(2)], [torch.ones(1, 2)], id="shape"),
        pytest.param([torch.ones(2)], [torch.ones(2).double()], id="type"),
        pytest.param([torch.ones(2)], [torch.ones(2), torch.ones(2)], id="number"),
        pytest.param([torch.tensor([1.0, float("nan")])], [torch.ones(2)], id="not finite"),
        pytest.param([torch.tensor([float("-inf")])], [torch.tensor([float("inf")])], id="the other infinity"),
    ],
)
def test_distance_refuses_what_cannot_be_compared(found: list[Tensor], expected: list[Tensor]) -> None:
    with pytest.raises(CheckFailed):
        distance(found, expected)


def test_the_tolerance_follows_type_and_magnitude() -> None:
    linear = randomized(nn.Linear(5, 3))
    graph = capture(linear, (X,))
    tolerance = fold_tolerance(graph, X)
    magnitude = nn.functional.linear(X.abs(), linear.weight.abs(), linear.bias.abs()).max()
    assert tolerance == pytest.approx(4 * torch.finfo(torch.float32).eps * 2 * float(magnitude.detach()), rel=1e-6)
    assert fold_tolerance(capture(linear.half(), (X.half(),)), X.half()) > 1000 * tolerance


def test_the_tolerance_sees_through_cancellation() -> None:
    """The result is small, the sum behind it is not: the tolerance must follow the sum (methods 13.7)."""
    linear = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1e4, -1e4]]))
    x = torch.ones(3, 2)
    assert fold_tolerance(capture(linear, (x,)), x) > 4 * torch.finfo(torch.float32).eps * 2e4


def test_randomized_is_hard_on_folds() -> None:
    module = randomized(nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), RepBN(7)).train())
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert not module.training
    assert isinstance(norm.running_var, Tensor)
    weight = norm.weight.detach()
    assert float(norm.running_var[0]) < norm.eps
    assert float(norm.running_var[1:].min()) >= 0.5
    assert 0 < float(weight.abs().min()) < 1e-2
    assert float(weight.min()) < 0 < float(weight.max())
    assert norm.num_batches_tracked == 0
    again = randomized(nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), RepBN(7)))
    assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))
    other = randomized(nn.BatchNorm2d(7), seed=1)
    assert not torch.equal(norm.weight, other.weight)


def test_seeded_touches_nothing_global() -> None:
    state = torch.get_rng_state()
    assert torch.equal(torch.randn(3, generator=seeded(5)), torch.randn(3, generator=seeded(5)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_model_has_parts_and_parameters() -> None:
    model = Small(lambda m, x: m.fc(x) * m.scale + m.offset, fc=nn.Linear(5, 3), scale=nn.Parameter(torch.ones(3)),
                  offset=torch.ones(3))  # fmt: skip
    assert {name for name, _ in model.named_parameters()} == {"fc.weight", "fc.bias", "scale"}
    assert model(X).shape == (4, 3)


def test_goldens_compare_and_update(tmp_path: Path) -> None:
    kept = Golden(tmp_path / "area" / "name.txt")
    assert kept.text == ""
    assert kept != "graph\n"
    assert Golden(kept.path, update=True) == "graph\n"
    assert kept == "graph\n"
    assert kept != "other\n"
    assert kept != 3
    assert picture("a\n", "b\n") == "before\na\n\nafter\nb\n"


def test_the_pass_in_the_documentation_works() -> None:
    text = (Path(__file__).parents[1] / "docs" / "writing-a-pass.md").read_text()
    example: dict[str, Any] = {"__name__": "example"}
    exec(text.split("```python\n")[1].split("```")[0], example)  # our own documentation
    graph = capture(Small(lambda m, x: (x.relu().neg().neg(), (y := x.abs().neg()).neg() + y)), (X,))
    report = check_pass_contract(example["DropDoubleNegation"](), graph, (X,))
    assert report.applied == {"negation-of-negation": 1}
    assert [refusal.reason for refusal in report.refused] == [Reason.SHARED]
    for name in ("check_pass_contract", "fold_tolerance", "randomized", "picture", "--update-golden"):
        assert name in text
    assert all(hasattr(Editor, name) for name in ("replace", "call", "redirect", "constant", "set_constant"))
