"""Trains the zoo again: ``python -m examples.zoo.train [NAME ...]`` (all of it without names)."""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.zoo.data import make
from examples.zoo.glyphs import render, seed_of
from examples.zoo.models import MODELS, ModelEntry

__all__ = ["accuracy", "export", "main", "train"]

WEIGHTS = Path(__file__).parent / "weights"
WARM_UP = 0.06
WEIGHT_DECAY = 0.05
CLIP = 1.0
REFRESH_BATCHES = 50


def train(name: str, *, device: str, seed: int = 0, steps: int | None = None) -> nn.Module:
    """Return the trained model in eval mode; the same seed and device give the same data and start."""
    entry = MODELS[name]
    steps = steps or entry.steps
    torch.manual_seed(seed)
    model = entry.build(steps).to(device)
    optimizer = torch.optim.AdamW(_groups(model), lr=entry.peak_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    started = time.perf_counter()
    model.train()
    for step, (images, labels) in enumerate(_batches(entry, steps, seed, device)):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"{name} step {step + 1}/{steps} loss {float(loss):.3f} {seconds:.0f} s", flush=True)
    _refresh_batch_norms(model, _batches(entry, REFRESH_BATCHES, seed + 1, device))
    return model.eval()


def _groups(model: nn.Module) -> list[dict[str, object]]:
    """Decay matrices only: not norms, biases, tokens and positions."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim in (2, 4)]
    others = [parameter for parameter in model.parameters() if parameter.ndim not in (2, 4)]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, steps: int) -> float:
    warm = max(int(WARM_UP * steps), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _batches(entry: ModelEntry, steps: int, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    if entry.task == "glyphs":
        for step in range(steps):
            yield render(entry.batch, seed_of("glyphs", "train", seed, f"step {step}"), device=device)
        return
    images, labels = (tensor.to(device) for tensor in make("digits", "train", 1078, 0))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (entry.batch,), generator=generator)
        # One pixel of shift: the digits are few, and none of them stands exactly in the middle.
        down, right = (int(torch.randint(-1, 2, (1,), generator=generator)) for _ in range(2))
        yield torch.roll(images[chosen], (down, right), (2, 3)), labels[chosen]


def _refresh_batch_norms(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Take batch norm statistics once more with frozen weights, as a cumulative average."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # type: ignore[assignment]
        norm.train()
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def accuracy(model: nn.Module, task: str, count: int, *, device: str = "cpu") -> float:
    """Return the share of test images (seed 0) that the model gets right."""
    images, labels = make(task, "test", count, 0)
    with torch.no_grad():
        found = [model(part.to(device)).argmax(dim=1).cpu() for part in images.split(500)]
    return float((torch.cat(found) == labels).float().mean())


def export(name: str, state: dict[str, Tensor]) -> Path:
    """Write the model as a torch.export archive with a dynamic batch and the input ``image``."""
    entry = MODELS[name]
    model = entry.build(entry.steps)
    model.load_state_dict(state)
    example = make(entry.task, "calib", 2, 0)[0]
    path = WEIGHTS / f"{name}.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model.eval(), (example,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}}
        )
        torch.export.save(program, path)
    return path


def main() -> None:
    """Train, or with ``--states`` only export what was trained elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--states", type=Path, help="write state dicts here (with --export: read them) as safetensors")
    parser.add_argument("--export", action="store_true", help="do not train: export the state dicts")
    parser.add_argument("--steps", type=int, help="train for fewer steps, to try things")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    WEIGHTS.mkdir(exist_ok=True)
    for name in given.names:
        if given.export:
            state = load_file(given.states / f"{name}.safetensors")
        else:
            model = train(name, device=device, steps=given.steps)
            count = 4000 if MODELS[name].task == "glyphs" else 359
            print(f"{name}: top-1 {accuracy(model, MODELS[name].task, count, device=device):.4f}", flush=True)
            state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
        if given.states and not given.export:
            given.states.mkdir(parents=True, exist_ok=True)
            save_file(state, given.states / f"{name}.safetensors")
        else:
            print(export(name, state))


if __name__ == "__main__":
    main()
