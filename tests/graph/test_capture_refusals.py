"""Which models are refused when they are captured, and what the refusal says."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.errors import BadInput, UnsupportedModel, UsageError
from normfuse.graph import Graph, capture
from normfuse.testing import Small, seeded


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(7))


def captured(function: Callable[[Any, Tensor], Any], x: Tensor, **parts: nn.Module | Tensor) -> Graph:
    return capture(Small(function, **parts).eval(), (x,))


@pytest.mark.parametrize("name", ["graph", "code"])
def test_a_name_that_torch_uses_itself_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.export cannot") as caught:
        captured(lambda m, x: getattr(m, name)(x), sample(3, 5), **{name: nn.Linear(5, 2)})
    assert name in caught.value.expected


class Counting(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


def test_a_model_that_changes_its_buffers_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="changes its own state") as caught:
        capture(Counting(), (sample(3, 5),))
    assert "count" in caught.value.where


def test_a_model_that_changes_its_inputs_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="or its inputs"):
        captured(lambda m, x: x.add_(1.0), sample(3, 5))


def test_control_flow_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"control flow.*cond") as caught:
        captured(lambda m, x: torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,)), sample(3, 5))
    assert "torch.cond" in caught.value.hint


def test_branching_on_data_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.export cannot capture") as caught:
        captured(lambda m, x: x * 2 if x.sum() > 0 else x, sample(3, 5))
    assert caught.value.__cause__ is not None


def test_torch_does_not_log_what_it_raises(caplog: pytest.LogCaptureFixture) -> None:
    x, weight = sample(2, 3, 5, 7), sample(4, 3, 2, 3)
    with pytest.raises(UnsupportedModel, match=r"torch\.export cannot capture"):
        captured(lambda m, x: torch.ops.aten.mkldnn_convolution(x, m.w, None, [0, 0], [1, 1], [1, 1], 1), x, w=weight)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_dropout_that_is_active_in_eval_mode_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="random") as caught:
        captured(lambda m, x: F.dropout(x, 0.5, training=True), sample(3, 5))
    assert "eval" in caught.value.hint


def test_a_program_exported_in_training_mode_is_refused() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train(), (sample(4, 5),))
    with pytest.raises(UnsupportedModel, match="random"):
        capture(program)


def test_example_inputs_are_needed_and_must_be_tensors() -> None:
    with pytest.raises(UsageError, match="example inputs"):
        capture(nn.Linear(3, 2))
    with pytest.raises(BadInput, match="no tensor"):
        capture(nn.Linear(3, 2), ([1.0, 2.0, 3.0],))  # type: ignore[arg-type]


def test_a_weight_that_holds_nan_is_named() -> None:
    head = nn.Linear(3, 4)
    head.weight.data[1, 2] = torch.nan
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), head)
    with pytest.raises(BadInput, match=r"^2\.weight holds NaN: 1 of 12 numbers"):
        capture(model, (sample(3, 5),))


def test_infinity_in_a_mask_and_nan_that_nobody_reads_are_no_matter() -> None:
    mask, unread = torch.tensor([0.0, -torch.inf, 0.0]), torch.full((2,), torch.nan)
    graph = captured(lambda m, x: (x + m.mask).softmax(-1), sample(4, 3), mask=mask, unread=unread)
    assert graph.run(sample(4, 3))[0].isfinite().all()


def test_outputs_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no tensor"):
        captured(lambda m, x: (x, 3), sample(3, 5))
