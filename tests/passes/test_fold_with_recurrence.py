"""Operators whose C++ code reads a free size as a number: folding around them fixes no batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.build import FOLDING
from normfuse.graph import capture
from normfuse.graph.edit import converted
from normfuse.testing import Small, distance, randomized, seeded

OPERATORS = [
    pytest.param(lambda m, x: m.layer(x)[0], nn.LSTM(5, 5, batch_first=True), id="lstm"),
    pytest.param(lambda m, x: m.layer(x)[0], nn.GRU(5, 5, batch_first=True), id="gru"),
    pytest.param(lambda m, x: torch.fft.fft2(x).real, nn.Identity(), id="fft2"),
]


@pytest.mark.parametrize(("operator", "layer"), OPERATORS)
def test_the_batch_stays_free(operator: Any, layer: nn.Module) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.first(x).mT).mT
        last: Tensor = m.last(y + operator(m, m.layer_norm(y)))
        return last

    parts = {
        "first": nn.Linear(3, 5),
        "norm": nn.BatchNorm1d(5),
        "layer_norm": nn.LayerNorm(5),
        "last": nn.Linear(5, 2),
    }
    model = randomized(Small(function, layer=layer, **parts))
    graph = capture(model, torch.randn(2, 4, 3, generator=seeded(0)))
    wide = converted(graph, torch.float64)
    FOLDING.run(graph)
    FOLDING.run(wide)
    # A size that something has fixed meanwhile still looks free, but torch knows its value.
    batches = [node.meta["val"].shape[0] for node in (*graph.inputs, *wide.inputs)]
    assert [batch.node.maybe_as_int() for batch in batches] == [None, None]
    x = torch.randn(7, 4, 3, generator=seeded(1), dtype=torch.float64)
    expected = model.double()(x)
    assert distance(wide.run(x), [expected]) < 1e-12
    assert distance(graph.run(x.float()), [expected.float()]) < 1e-4
