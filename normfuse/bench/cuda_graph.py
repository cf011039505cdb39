"""Records what a call does on a GPU as one CUDA graph, whose replay costs the host a single launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import torch

__all__ = ["recorded"]

RUNS_BEFORE_RECORDING: Final = 3

Output = TypeVar("Output")


def recorded(call: Callable[[], Output]) -> Callable[[], Output]:
    """Return the replay of a CUDA graph of one call: it reads and writes the memory of the recorded one, always.

    The call enqueues on PyTorch's current stream, which is another one while it is recorded.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # libraries choose and allocate in their first runs, which no graph may hold
        for _ in range(RUNS_BEFORE_RECORDING):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Output:
        graph.replay()
        return output

    return replay
