"""Names the layer and the calibration sample of a value that is not finite."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from normfuse.errors import BadInput
from normfuse.graph import query

__all__ = ["not_finite"]


def not_finite(node: fx.Node, is_bad: Tensor, numbers: Sequence[int]) -> BadInput:
    """Return the error for a value of a node with bad elements, of a chunk that holds the samples of these numbers.

    Rows belong to samples where the first axis can be split among them evenly; else the chunk is named.
    """
    rows = is_bad.reshape(is_bad.shape[0], -1).any(dim=1).nonzero() if is_bad.ndim else is_bad.new_empty(0)
    where = f"calibration samples {', '.join(map(str, numbers))}"
    if len(numbers) == 1:
        where = f"calibration sample {numbers[0]}"
    elif len(rows) and is_bad.shape[0] % len(numbers) == 0:
        where = f"calibration sample {numbers[int(rows[0]) // (is_bad.shape[0] // len(numbers))]}"
    return BadInput(
        "an activation is not finite",
        where=f"{query.layer_of(node) or node.name}, {where}",
        expected="finite values everywhere",
        hint="check the model on these samples, or leave them out",
    )
