"""``make bench-gpu``: what PyTorch alone makes of a ViT on a GPU, with layer norms and with norms that are folded away.

Every variant (eager in three types; compiled and recorded as one CUDA graph in two types and with 8-bit linear maps) of
every kind of norm is measured in one process, in turns, round by round. Nothing is transferred in the measured time.
On the CPU the whole code runs, for trying it, with plain calls in place of CUDA graphs; those figures are no baselines.

The JSON of ``-o`` (times in milliseconds; null stands for what is unknown or not finite)::

    format, schema   "normfuse gpu baselines", 1
    environment      processor and packages (normfuse.bench.environment); "device": type, name, capability, memory_gib,
                     multiprocessors, driver, cuda, cudnn, triton, tf32
    model            name, size, patch, classes, width, depth, heads, parameters: by kind of norm, as measured
    method           seed, rounds, warm_up_ms, seconds, clock ("cuda events" or "host"), cuda_graphs, compile_mode
                     (null: not compiled), data_transfers, calibration_images, evaluated_images
    entries          one per batch, variant and kind of norm:
      batch, variant, norm, status ("measured", "skipped", "failed"), reason ("" where measured)
      and where measured
      compiled, cuda_graph, compile_s   how it runs; compile_s is the first call, with all autotuning
      quantized, left  names of the linear maps with codes; those that stay float, with the reason
      accuracy         against the unfolded network, eager in fp32: cosine (all logits as one vector), max_error (the
                       largest difference over the largest magnitude), top_1_agreement (percent; of random images, to
                       which random networks answer much alike)
      n                inferences measured
      throughput_qps   batches per second, one enqueued ahead
      gpu_ms           trtexec's "GPU Compute": min, max, mean, median (of the rounds' medians), p90, p95, p99
      enqueue_ms       the host's time to enqueue; above gpu_ms the launches are what takes the time
      latency_ms       trtexec's sum of transfers and compute: gpu_ms, as nothing is transferred
      host_ms          an inference alone, by the host's clock, from the call until the device is done
      round_medians_ms, spread          the rounds' medians of gpu_ms, and (largest - smallest) / median
      against_ln       how many times as fast as LN in the same variant (median of the rounds' ratios; null: no LN)
    states           batch, round, and sm_clock_mhz, memory_clock_mhz, temperature_c, power_w, power_limit_w right after
                     it, as nvidia-smi tells (none: it does not)

On the CPU, ``gpu_ms`` and ``enqueue_ms`` are the time of a call by the host's clock; ``method.clock`` says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.deit import NORMS
from benchmarks.gpu_entries import Candidate, closeness, show
from benchmarks.gpu_variants import COMPILE_MODE, VARIANTS, Variant, prepare, release
from benchmarks.vision import CALIBRATION, SHAPES, Network, build, colour_images, shape_of
from normfuse.atomic import write_file
from normfuse.bench.environment import describe_environment
from normfuse.bench.gpu_device import describe_device, device_state, open_device
from normfuse.bench.gpu_timing import GpuSchedule, take_turn
from normfuse.bench.timing import turn_order
from normfuse.cli import render
from normfuse.errors import NormfuseError
from normfuse.strict_json import strict_json

__all__ = ["Job", "main", "measure"]

EVALUATED: Final = 128
"""Images that accuracy is judged on."""
EVALUATED_TOGETHER: Final = 32
SCHEMA: Final = 1
PLAN: Final = GpuSchedule()
BY_NAME: Final = {variant.name: variant for variant in VARIANTS}
WORDS: Final = {name.lower(): name for name in NORMS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to measure, on what, and for how long."""

    device: torch.device
    model: str
    batches: Sequence[int]
    norms: Sequence[str]
    variants: Sequence[Variant] = VARIANTS
    compiles: bool = True
    seed: int = 0
    schedule: GpuSchedule = PLAN


def main() -> None:
    """Measure, print a table per batch size, write the JSON; exit with 5 where there is no such device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=SHAPES, default="vit-s")
    parser.add_argument("--batch", type=_positive, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--norms", choices=WORDS, nargs="+", default=list(WORDS))
    parser.add_argument("--variants", choices=BY_NAME, nargs="+", default=list(BY_NAME))
    parser.add_argument("--no-compile", action="store_true", help="do not call torch.compile (quick, no baseline)")
    parser.add_argument("--rounds", type=_positive, default=PLAN.rounds)
    parser.add_argument("--seconds", type=float, default=PLAN.seconds, help="of one engine in one round")
    parser.add_argument("--warm-up", type=float, default=PLAN.warm_up_ms, help="milliseconds before each of them")
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    try:
        job = Job(
            device=open_device(given.device, needed_for="python -m benchmarks.gpu (--device cpu tries it)"),
            model=given.model,
            batches=list(dict.fromkeys(given.batch)),
            norms=[WORDS[word] for word in dict.fromkeys(given.norms)],
            variants=[BY_NAME[name] for name in dict.fromkeys(given.variants)],
            compiles=not given.no_compile,
            schedule=GpuSchedule(rounds=given.rounds, seconds=given.seconds, warm_up_ms=given.warm_up),
        )
        found = measure(job)
        if given.output:
            write_file(given.output, strict_json(found).encode())
    except NormfuseError as error:
        render.error(error)
        sys.exit(error.exit_code)


def measure(job: Job) -> dict[str, Any]:
    """Measure everything, showing a table after every batch size; return what the JSON holds."""
    torch.manual_seed(job.seed)
    with render.ShownProgress().task("networks, folded", len(job.norms)) as advance:
        networks = [_built(job, norm, advance) for norm in job.norms]
    device = {**describe_device(job.device), "tf32": False}  # open_device has turned it off
    found: dict[str, Any] = {
        "format": "normfuse gpu baselines",
        "schema": SCHEMA,
        "environment": {**describe_environment().as_dict(), "device": device},
        "model": {**shape_of(job.model), "parameters": {each.norm: _parameters(each) for each in networks}},
        "method": _method(job),
        "entries": [],
        "states": [],
    }
    images = colour_images(EVALUATED, SHAPES[job.model].size, seed=job.seed + 2)
    with torch.no_grad():
        wanted = {each.norm: _reference(each, images, job.device) for each in networks}
        for batch in job.batches:
            release(job.device)  # what the batch before has left
            candidates, states = _measure_batch(job, networks, batch, images, wanted)
            entries = [candidate.entry(candidates) for candidate in candidates]
            found["entries"] += entries
            found["states"] += states
            title = f"{job.model} on {device['name'] or 'this CPU'}, batch {batch}"
            show(entries, title if job.compiles else f"{title}, NOT compiled", device["type"])
            del candidates
    return found


def _built(job: Job, norm: str, advance: Callable[[int], None]) -> Network:
    network = build(job.model, norm, seed=job.seed)
    advance(1)
    return network


def _method(job: Job) -> dict[str, Any]:
    is_cuda = job.device.type == "cuda"
    return {
        "seed": job.seed,
        "rounds": job.schedule.rounds,
        "warm_up_ms": job.schedule.warm_up_ms,
        "seconds": job.schedule.seconds,
        "clock": "cuda events" if is_cuda else "host",
        "cuda_graphs": is_cuda,
        "compile_mode": COMPILE_MODE if job.compiles else None,
        "data_transfers": False,
        "calibration_images": CALIBRATION,
        "evaluated_images": EVALUATED,
    }


def _parameters(network: Network) -> int:
    return sum(value.numel() for value in network.measured.buffers() if value.is_floating_point())


def _reference(network: Network, images: Tensor, device: torch.device) -> Tensor:
    """Return the float64 logits that the unfolded network computes in fp32, on the same device."""
    model = network.reference.to(device)
    logits = torch.cat([model(part.to(device)).double().cpu() for part in torch.split(images, EVALUATED_TOGETHER)])
    network.reference.cpu()
    return logits


def _measure_batch(
    job: Job, networks: Sequence[Network], batch: int, images: Tensor, wanted: Mapping[str, Tensor]
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Return candidates and states of one batch size, for which all engines are in memory together."""
    given = colour_images(batch, SHAPES[job.model].size, seed=job.seed + 3)
    candidates = [
        Candidate(batch=batch, variant=variant, network=network) for variant in job.variants for network in networks
    ]
    shown, states = render.ShownProgress(), []
    with shown.task(f"batch {batch}: preparing", len(candidates)) as advance:
        for candidate in candidates:
            candidate.attempt(partial(_prepare, job=job, given=given, images=images, wanted=wanted))
            advance(1)
    by_label = {candidate.label: candidate for candidate in candidates}
    with shown.task(f"batch {batch}: measuring", len(candidates) * job.schedule.rounds) as advance:
        for index, label in enumerate(turn_order(list(by_label), job.schedule.rounds), start=1):
            by_label[label].attempt(partial(_turn, job=job))
            advance(1)
            if index % len(candidates) == 0 and (state := device_state(job.device)) is not None:
                states.append({"batch": batch, "round": index // len(candidates), **state})
    return candidates, states


def _prepare(candidate: Candidate, *, job: Job, given: Tensor, images: Tensor, wanted: Mapping[str, Tensor]) -> None:
    engine = prepare(candidate.variant, candidate.network, given, job.device, compiles=job.compiles)
    candidate.accuracy = closeness(engine.predict(images), wanted[candidate.network.norm])
    candidate.engine = engine


def _turn(candidate: Candidate, *, job: Job) -> None:
    if candidate.engine is not None:
        candidate.turns.append(take_turn(candidate.engine.run, job.device, job.schedule))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


if __name__ == "__main__":
    main()
