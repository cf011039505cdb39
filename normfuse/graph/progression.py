"""PRepBN layers whose progressive replacement has not ended: their eval mode is not what was trained (methods 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.graph import metadata

__all__ = ["counters", "mark_unfinished", "steps_left", "unfinished_steps"]

KEY: Final = "progression"
COUNTER: Final = "iter"
BESIDE: Final = ("total_step", "norm2.alpha")


def unfinished_steps(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the module path of every unfinished layer and the forwards that it has left.

    A layer is known by its checkpoint's keys (methods 13.8): ``iter``, ``total_step`` and ``norm2.alpha`` beside
    each other.
    """
    found = {}
    for key, value in state.items():
        path, dot, name = key.rpartition(".")
        is_whole = all(f"{path}{dot}{other}" in state for other in BESIDE)
        if name == COUNTER and is_whole and value.numel() == 1 and int(value) > 0:
            found[path] = int(value)
    return found


def mark_unfinished(node: fx.Node, steps: Mapping[str, int]) -> None:
    """Note layer and forwards left on a node that belongs to an unfinished layer, or that reads its constants.

    A module made of a graph has lost its layers, but not the names of its constants.
    """
    constants = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    for path, left in steps.items():
        if not path or any(f"{place}.".startswith(f"{path}.") for place in (metadata.layer_of(node), *constants)):
            metadata.note(node, KEY, (path, left))


def steps_left(node: fx.Node) -> int:
    """Return the forwards that the node's layer has left in training, 0 for every other node."""
    noted = metadata.noted(node, KEY)
    return int(noted[1]) if isinstance(noted, tuple) else 0


def counters(nodes: Iterable[fx.Node]) -> dict[str, Tensor]:
    """Return the keys by which a capture of what is made of the graph knows its unfinished layers again."""
    found = [metadata.noted(node, KEY) for node in nodes]
    state: dict[str, Tensor] = {}
    for path, left in dict.fromkeys(noted for noted in found if isinstance(noted, tuple)):
        parent = f"{path}." if path else ""
        state |= {f"{parent}{name}": torch.tensor([left]) for name in (COUNTER, *BESIDE)}
    return state
