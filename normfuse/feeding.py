"""What a graph is fed: the user's samples bound to its inputs, or random ones, as batches that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from normfuse.data import InputSpec, Sample, Samples, check_samples
from normfuse.errors import BadInput
from normfuse.graph import Graph, query
from normfuse.graph.graph import TensorSpec

__all__ = ["Stream", "bind", "fixed_batch", "random_inputs", "random_samples", "stream"]

Stream = Callable[[], Iterator[Sequence[Tensor]]]
"""Called once per run; yields one tensor per input, in the order of the graph's inputs."""

RANDOM_BATCHES = 4
"""Enough to meet a mistake of a fold or an export; random data proves no more with more of it."""


def bind(samples: Samples, graph: Graph) -> Samples:
    """Return the samples under the names and in the types of the graph's inputs.

    Raises:
        BadInput: they do not fit, the message names file, array, expected and found; or they do not fill one batch of
            a model that fixes its batch.
    """
    specs = [
        InputSpec(spec.name, (None, *spec.shape[1:]), str(spec.dtype).removeprefix("torch."))
        for spec in graph.input_specs
    ]
    bound = check_samples(samples, specs)
    _refuse_too_few(bound, graph, hint="give more samples, or export the model with a dynamic batch")
    return bound


def fixed_batch(graph: Graph) -> int | None:
    """Return the only batch that the model takes, or None where it takes any."""
    firsts = [spec.shape[0] for spec in graph.input_specs if spec.shape]
    return next((size for size in firsts if size is not None), None)


def stream(samples: Samples, graph: Graph, *, limit: int = 0) -> Stream:
    """Return a source of single samples as tensors (whole batches where the model fixes its batch).

    Raises:
        BadInput: ``limit`` leaves fewer samples than the model's batch.
    """
    fixed, specs = fixed_batch(graph), graph.input_specs
    kept = samples.first(limit) if limit else samples
    _refuse_too_few(kept, graph, hint="use more calibration samples (--samples), or 0 for all of them")

    def read() -> Iterator[Sequence[Tensor]]:
        for batch in kept.batches(fixed or 1):
            if fixed is None or len(batch) == fixed:
                arrays = [batch.inputs[spec.name] for spec in specs]
                # An input without axes has no batch either: samples of it are numbers, and a batch has one for all.
                pairs = zip(specs, arrays, strict=True)
                yield [torch.from_numpy(array if spec.shape else np.asarray(array[0])) for spec, array in pairs]

    return read


def _refuse_too_few(samples: Samples, graph: Graph, *, hint: str) -> None:
    fixed = fixed_batch(graph)
    if fixed is not None and len(samples) < fixed:
        raise BadInput(
            f"the model takes batches of {fixed}, there are {len(samples)} samples",
            where=samples.source,
            expected=f"{fixed} samples or more",
            hint=hint,
        )


def random_samples(graph: Graph, *, seed: int) -> Samples:
    """Return a few seeded random samples, for a model that came without data.

    Floats are normal, integers 0 or 1 (valid as class, token and mask alike). Axes of any size are as long as in the
    example that the model was captured with, so that a sequence is no single token.
    """
    pairs = list(zip(graph.input_specs, graph.inputs, strict=True))

    def read() -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(seed)
        for index in range(count):
            arrays = {spec.name: _random(spec, node, generator).numpy() for spec, node in pairs}
            yield Sample(arrays, f"random sample {index}")

    count = RANDOM_BATCHES * (fixed_batch(graph) or 1)
    names = tuple(spec.name for spec, _ in pairs)
    return Samples(source=f"random samples, seed {seed}", names=names, count=count, read=read)


def random_inputs(graph: Graph, *, count: int, seed: int) -> list[Sequence[Tensor]]:
    """Return the first of `random_samples` as tensors in the order of the graph's inputs, in any type that torch knows.

    Each is one sample, or a whole batch where the model fixes its batch.
    """
    generator = torch.Generator().manual_seed(seed)
    specs, nodes, batch = graph.input_specs, graph.inputs, fixed_batch(graph) or 1
    found: list[Sequence[Tensor]] = []
    for _ in range(count):
        samples = [[_random(*pair, generator) for pair in zip(specs, nodes, strict=True)] for _ in range(batch)]
        columns = zip(specs, zip(*samples, strict=True), strict=True)
        # An input without axes has no batch either.
        found.append([(torch.stack(each) if spec.shape else each[0]).to(spec.dtype) for spec, each in columns])
    return found


def _random(spec: TensorSpec, node: fx.Node, generator: torch.Generator) -> Tensor:
    # Plain types: binding casts them to the input's, and refuses a type that NumPy lacks.
    sizes = [_size_in_example(size) for size in query.shape(node)[1:]]
    if spec.dtype.is_floating_point:
        return torch.randn(sizes, generator=generator)
    return torch.randint(0, 2, sizes, generator=generator)


def _size_in_example(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return hint if isinstance(hint, int) else 1
