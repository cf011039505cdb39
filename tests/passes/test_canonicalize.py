"""One spelling per operation, and not one number changed."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.passes.canonicalize import Canonicalize
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, sample, seeded

ATEN = ops.ATEN


def calls(graph: Graph) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in graph.nodes if node.op == "call_function"]


def many_spellings(m: Any, x: Tensor) -> Tensor:
    tokens = m.patch(x).flatten(2).transpose(1, 2).contiguous()
    heads = torch.dropout(tokens, 0.5, False).view(x.shape[0], -1, 2, 3).permute(0, 2, 1, 3)
    joined = heads.transpose(1, 2).reshape(x.shape[0], -1, 6)[:, :].unsqueeze(1).squeeze(1).clone()
    mixed: Tensor = torch.addmm(m.bias, joined.reshape(-1, 6), m.matrix).view(x.shape[0], -1, 7).mT @ joined.double()
    return mixed.expand(-1, 7, 6)


def model() -> nn.Module:
    matrix = torch.randn(6, 7, generator=seeded(1)).double()
    return Small(many_spellings, patch=nn.Conv2d(3, 6, 3, padding="same").double(), matrix=matrix, bias=matrix[0])


def test_picture(golden: Golden) -> None:
    graph = capture(model(), (sample(2, 3, 4, 5),))
    before = graph.text()
    Canonicalize().run(graph)
    assert picture(before, graph.text()) == golden


def test_numbers_and_contract() -> None:
    x, original = sample(2, 3, 4, 5), model()
    graph = capture(original, (x,))
    assert check_pass_contract(Canonicalize(), graph, (x,)).changed
    Canonicalize().run(graph)
    for batch in (1, 2, 5):
        x = sample(batch, 3, 4, 5)
        assert distance(graph.run(x), [original(x)]) < 1e-15


IDENTITIES = [
    pytest.param(lambda m, x: x.clone().relu(), id="clone"),
    pytest.param(lambda m, x: x.contiguous().detach().relu(), id="contiguous"),
    pytest.param(lambda m, x: torch.dropout(x, 0.3, False).relu(), id="dropout in eval mode"),
    pytest.param(lambda m, x: x[:, 0:5].relu(), id="full slice"),
    pytest.param(lambda m, x: x.to(torch.float64).relu(), id="cast to its own type"),
    pytest.param(lambda m, x: x.expand(-1, 5, 7).relu(), id="expand to its own shape"),
    pytest.param(lambda m, x: x.view(-1, 5, 7).relu(), id="view of its own shape"),
    pytest.param(lambda m, x: x.mT.mT.relu(), id="two transposes"),
    pytest.param(lambda m, x: x.flatten(1).unflatten(1, (5, 7)).relu(), id="flatten and back"),
    pytest.param(lambda m, x: x.movedim(1, 2).movedim(-1, -2).relu(), id="moved there and back"),
]


@pytest.mark.parametrize("function", IDENTITIES)
def test_what_returns_its_input_goes(function: Any) -> None:
    graph = capture(Small(function), (sample(3, 5, 7),))
    Canonicalize().run(graph)
    assert calls(graph) == ["relu.default"]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: x[:, 1:].relu(), id="slice"),
        pytest.param(lambda m, x: x[:, ::2].relu(), id="slice with a step"),
        pytest.param(lambda m, x: x[:, :1].expand(-1, 5, 7).relu(), id="expand"),
        pytest.param(lambda m, x: x.float().double().relu(), id="cast and back: it rounds"),
        pytest.param(lambda m, x: x.reshape(-1, 7, 5).relu(), id="another shape"),
        pytest.param(lambda m, x: x[:, :, :5].mT.relu(), id="transposed square"),
        pytest.param(lambda m, x: x.flip(1).relu(), id="unknown"),
    ],
)
def test_what_changes_something_stays(function: Any) -> None:
    x = sample(3, 5, 7)
    graph = capture(Small(function), (x,))
    Canonicalize().run(graph)
    assert len(calls(graph)) > 1
    assert distance(graph.run(x), [function(None, x)]) == 0


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "both", "ends"),
    [
        pytest.param("same", (3, 5), (1, 1), [1, 2], [], id="same"),
        pytest.param("same", (3, 4), (2, 2), [2, 3], [], id="an even kernel, dilated evenly"),
        pytest.param("valid", (2, 3), (1, 1), [0, 0], [], id="valid"),
        pytest.param("same", (2, 3), (1, 1), [0, 1], [[0, 0, 0, 1]], id="one more row"),
        pytest.param("same", (3, 4), (1, 3), [1, 4], [[0, 1, 0, 0]], id="one more column"),
        pytest.param("same", (6, 4), (1, 1), [2, 1], [[0, 1, 0, 1]], id="one more of both"),
    ],
)
def test_padding_by_a_word(padding: str, kernel: Any, dilation: Any, both: list[int], ends: list[list[int]]) -> None:
    conv = nn.Conv2d(4, 6, kernel, padding=padding, dilation=dilation, groups=2).double()
    x = sample(2, 4, 9, 8)
    graph = capture(conv, (x,))
    Canonicalize().run(graph)
    assert [list(node.args[4]) for node in graph.nodes if query.is_call(node, ops.CONV2D)] == [both]  # type: ignore[arg-type]
    assert [list(node.args[1]) for node in graph.nodes if query.is_call(node, ops.PAD)] == ends  # type: ignore[arg-type]
    assert distance(graph.run(x), [conv(x)]) == 0


TRACED = [
    pytest.param(nn.Conv1d(4, 6, 3, stride=2, groups=2), (9,), "conv1d.default", id="conv1d"),
    pytest.param(nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(1, 2)), (9, 8), "conv2d.default", id="conv2d"),
    pytest.param(nn.Conv2d(4, 6, 3, padding="same", bias=False), (9, 8), "conv2d.default", id="padding by a word"),
    pytest.param(nn.Conv3d(4, 6, 2, bias=False), (4, 3, 5), "conv3d.default", id="conv3d"),
    pytest.param(nn.ConvTranspose1d(4, 6, 3, dilation=2), (9,), "conv_transpose1d.default", id="transposed, 1 axis"),
    pytest.param(
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, output_padding=(0, 1), groups=2),
        (5, 3),
        "conv_transpose2d.input",
        id="transposed, 2 axes",
    ),
    pytest.param(nn.ConvTranspose3d(4, 6, 2), (4, 3, 5), "conv_transpose3d.input", id="transposed, 3 axes"),
]


@pytest.mark.parametrize(("conv", "space", "expected"), TRACED)
def test_convolutions_of_a_traced_model_say_their_axes(conv: nn.Module, space: tuple[int, ...], expected: str) -> None:
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(space) - 1](6)
    model, x = randomized(nn.Sequential(conv, norm).double()), sample(2, 4, *space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        graph = capture(torch.jit.trace(model, x), (x,))  # type: ignore[no-untyped-call]
    Canonicalize().run(graph)
    assert calls(graph)[:-1] == [expected, "_native_batch_norm_legit_no_training.default"]
    check_pass_contract(Canonicalize(), graph, (x,))
    x = sample(3, 4, *space)
    assert distance(graph.run(x), [model(x)]) < 1e-15


def test_a_convolution_with_one_number_for_all_axes() -> None:
    def convolution(m: Any, x: Tensor) -> Tensor:
        y: Tensor = ATEN.convolution.default(x, m.w, None, [2], [1], [1], False, [0], 1)
        return y

    x, w = sample(2, 4, 9, 8), sample(6, 4, 3, 2)
    graph = capture(Small(convolution, w=w), (x,))
    Canonicalize().run(graph)
    (conv,) = [node for node in graph.nodes if query.is_call(node, ops.CONV2D)]
    assert conv.args[3:6] == ([2, 2], [1, 1], [1, 1])
    assert distance(graph.run(x), [nn.functional.conv2d(x, w, None, 2, 1)]) < 1e-15


BATCH_NORMS = [
    pytest.param(lambda m, x: ATEN._native_batch_norm_legit_functional(x, *m.all(), False, 0.1, 1e-3), id="functional"),
    pytest.param(lambda m, x: ATEN.native_batch_norm(x, *m.all(), False, 0.1, 1e-3), id="native"),
    pytest.param(lambda m, x: ATEN.cudnn_batch_norm(x, *m.all(), False, 0.1, 1e-3), id="cudnn"),
    pytest.param(lambda m, x: ATEN.miopen_batch_norm(x, *m.all(), False, 0.1, 1e-3), id="miopen"),
    pytest.param(lambda m, x: ATEN._batch_norm_no_update(x, *m.all(), 0.1, 1e-3), id="no update"),
    pytest.param(lambda m, x: [ATEN.batch_norm(x, *m.all(), False, 0.1, 1e-3, True)], id="batch_norm"),
]


@pytest.mark.parametrize("function", BATCH_NORMS)
def test_every_batch_norm_is_the_one_that_never_trains(function: Any) -> None:
    norm, x = randomized(nn.BatchNorm2d(4, eps=1e-3).double()), sample(2, 4, 3, 5)
    graph = capture(Small(lambda m, x: function(m.norm, x)[0], norm=AllGiven(norm)), (x,))
    report = Canonicalize().run(graph)
    assert calls(graph)[:-1] == ["_native_batch_norm_legit_no_training.default"]
    assert distance(graph.run(x), [norm(x)]) < 1e-14
    assert set(report.applied) <= {"batch-norm-never-trains"}


def test_a_batch_norm_that_trains_stays() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y: Tensor = ATEN._native_batch_norm_legit_functional(x, *m.norm.all(), True, 0.1, 1e-3)[0]
        return y

    graph = capture(Small(function, norm=AllGiven(nn.BatchNorm2d(4).double())), (sample(2, 4, 3, 5),))
    assert not Canonicalize().run(graph).changed


class AllGiven(nn.Module):
    """Gives what every spelling of a batch norm takes first."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def all(self) -> list[Tensor | None]:
        norm = self.norm
        return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def test_two_dynamic_axes_stay() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.unsqueeze(1) * y.unsqueeze(0)).flatten(0, 1).reshape(x.shape[0], y.shape[0], 5)

    graph = capture(Two(), (sample(2, 5), sample(3, 5)))
    Canonicalize().run(graph)
    x, y = sample(4, 5), sample(7, 5)
    assert distance(graph.run(x, y), [x.unsqueeze(1) * y]) == 0
