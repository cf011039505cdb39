"""``make bench-scoring``: what every score costs on a DeiT-S, in forward and backward passes; and the solver's time."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.deit import NORMS, deit_small, images
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.build import FOLDING
from normfuse.capturing import capture_model
from normfuse.cli import render
from normfuse.export.placement import onnx_placement
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision import chunked
from normfuse.quant.allocation import Unit, allocate
from normfuse.quant.bits import MOST, Bits
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.quant.score_method import ScoreMethod
from normfuse.sensitivity.methods import score
from normfuse.sensitivity.subject import Subject, ranges_by_width
from normfuse.sensitivity.watched_run import WatchedRun

__all__ = ["main"]

CHUNK: Final = 8
LAYERS, WIDTHS = 400, (2, 3, 4, 5, 6, 7, 8)
MOST_SECONDS, MOST_PASSES = 10, 4
"""What the solver and relevance may take; above that the benchmark fails."""

placement_of = partial(onnx_placement, "avx512_vnni")


def main() -> None:
    """Print the time of every score over that of a forward and backward pass of the same samples, run in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--norm", choices=list(NORMS), default="LN")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8], help="of weights; activations have 8 bits")
    parser.add_argument("--methods", nargs="+", type=ScoreMethod, default=list(ScoreMethod))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    subject = _subject(given.norm, given.samples, given.widths)
    runs: dict[str, Callable[[], object]] = {"forward and backward": lambda: _forward_and_backward(subject)}
    for method in given.methods:
        runs[method.value] = partial(score, subject, method)
    seconds = _in_turns(runs, given.rounds)
    base = median(seconds["forward and backward"])
    rows = []
    for name, found in seconds.items():
        passes = [each / base for each in found]
        rows.append((name, f"{median(found):.2f}", f"{median(passes):.2f}", f"{min(passes):.2f} to {max(passes):.2f}"))
    facts = describe_environment().as_dict()
    title = f"DeiT-S, {given.norm}, {given.samples} samples, {given.threads} threads, {facts['processor']}"
    render.table(title, ("", "seconds", "passes", "rounds"), rows)
    slowest = max(_solver("bops"), _solver("bops", "bytes", together=3))
    passes = median(seconds[ScoreMethod.RELEVANCE.value]) / base if ScoreMethod.RELEVANCE in given.methods else 0.0
    if slowest > MOST_SECONDS or passes > MOST_PASSES:
        sys.exit(f"too slow: the solver may take {MOST_SECONDS} s, lrp {MOST_PASSES} passes")


def _subject(norm: str, count: int, widths: Sequence[int]) -> Subject:
    samples = images(count)
    graph = capture_model(deit_small(norm), (samples[:2],), None)
    FOLDING.run(graph)
    place = Phase("precision", (PlaceQuantizers(placement=placement_of(Bits(MOST, MOST))),))
    Pipeline(phases=(place,), given=frozenset({Fact.FOLDED})).run(graph)
    singles = [(sample[None],) for sample in samples]
    ranges = ranges_by_width(
        graph,
        lambda: iter(singles[:CHUNK]),
        placement_of=placement_of,
        widths=[MOST],
        method=CalibrationMethod.MIN_MAX,
    )
    subject = Subject(
        graph=graph,
        chunks=chunked(singles, CHUNK),
        placement_of=placement_of,
        weight_widths=tuple(sorted(widths)),
        activation_widths=(MOST,),
        ranges=ranges,
    )
    for node in subject.maps:  # rounding weights is no part of a score
        for width in subject.weight_widths:
            subject.weight(node, width)
    return subject


def _forward_and_backward(subject: Subject) -> None:
    """Run every chunk, and the gradients of all weights and activations of the sum of its outputs."""
    for chunk in subject.chunks:
        run = WatchedRun.of(subject, chunk, with_weights=True)
        total: Tensor = torch.stack([value.sum() for value in run.outputs]).sum()
        torch.autograd.grad(total, [*run.weights.values(), *run.places.values()])


def _in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - started)
    return found


def _solver(*limited: str, together: int = 1) -> float:
    """Print and return the processor's seconds that bits for many layers take, at half of what eight bits use.

    Sizes and damages are random; so many neighbours share the bits of their activations.
    """
    generator = np.random.default_rng(0)
    units = []
    for number in range(LAYERS):
        macs, weights, weight, activation = *10 ** generator.uniform([5, 3], [8, 6]), *10 ** generator.uniform(-6, 0, 2)
        pairs = [Bits(w, a) for w in WIDTHS for a in WIDTHS]
        noise = np.exp(generator.normal(0, 0.3, len(pairs)))
        damage = {
            bits: float(factor * (weight * 4.0**-bits.weight + activation * 4.0**-bits.activation))
            for bits, factor in zip(pairs, noise, strict=True)
        }
        use = {
            bits: {"bops": macs * bits.weight * bits.activation, "bytes": weights * bits.weight / 8} for bits in pairs
        }
        tie = f"tie {number // together}" if together > 1 else None
        units.append(Unit(name=f"layer {number}", damage=damage, use=use, tie=tie))
    limits = {name: sum(unit.use[Bits(MOST, MOST)][name] for unit in units) / 2 for name in limited}
    started = time.process_time()
    found = allocate(units, limits)
    taken = time.process_time() - started
    told = (
        f"{LAYERS} layers of {len(WIDTHS)} x {len(WIDTHS)} widths, {together} tied, limits of {' and '.join(limited)}"
    )
    print(f"{told}: {taken:.2f} s of the processor, proven to {found.gap:.1e} of the damage")
    return taken


if __name__ == "__main__":
    main()
