"""PRepBN layers whose progressive replacement has not ended: their eval mode is not what was trained (methods 2.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from normfuse.graph import metadata

__all__ = ["mark_unfinished", "steps_left", "unfinished_steps"]

KEY = "progression"


def unfinished_steps(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the module path of every unfinished layer and the forwards that it has left.

    A layer is known by its checkpoint's keys (methods 13.8): ``iter``, ``total_step`` and ``norm2.alpha`` beside
    each other.
    """
    found = {}
    for key, value in state.items():
        path, dot, name = key.rpartition(".")
        others = (f"{path}{dot}total_step", f"{path}{dot}norm2.alpha")
        if name == "iter" and all(other in state for other in others) and value.numel() == 1 and int(value) > 0:
            found[path] = int(value)
    return found


def mark_unfinished(node: fx.Node, steps: Mapping[str, int]) -> None:
    """Note the forwards left on a node that belongs to an unfinished layer."""
    layer = metadata.layer_of(node)
    for path, left in steps.items():
        if not path or layer == path or layer.startswith(f"{path}."):
            metadata.note(node, KEY, left)


def steps_left(node: fx.Node) -> int:
    """Return the forwards that the node's layer has left in training, 0 for every other node."""
    left = metadata.noted(node, KEY)
    return left if isinstance(left, int) else 0
