"""Trains the zoo again: ``python -m examples.zoo.train [NAME ...]`` (all of it without names)."""

from __future__ import annotations

import argparse
import math
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from examples.zoo.data import RENDERERS, make
from examples.zoo.glyphs import seed_of
from examples.zoo.models import MODELS, ModelEntry
from normfuse.bench.accuracy import Score, score

__all__ = ["WEIGHTS", "evaluate", "export", "main", "train"]

WEIGHTS = Path(__file__).parent / "weights"
REPOSITORY = Path(__file__).parents[2]
FOLDERS = re.compile(rf'(?<=File ")([^"]*/site-packages/|{re.escape(str(REPOSITORY))}/)')
TEST_COUNT = {"glyphs": 4000, "digits": 360, "glyph-scenes": 1000}
DIGITS_TRAIN_COUNT = 1078
WEIGHT_DECAY = 0.05
SMOOTHING = 0.05
CLIP = 1.0
REFRESH_BATCHES = 50


def train(name: str, *, device: str, seed: int = 0, steps: int | None = None) -> nn.Module:
    """Return the trained model in eval mode; the same seed and device give the same data and start."""
    entry = MODELS[name]
    steps = steps or entry.steps
    torch.manual_seed(seed)
    model = entry.build(steps).to(device)
    optimizer = torch.optim.AdamW(_groups(model), lr=entry.peak_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, entry.warm_up))
    started = time.perf_counter()
    model.train()
    for step, (images, labels) in enumerate(_batches(entry, steps, seed, device)):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(f"{name} step {step + 1}/{steps} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
    _refresh_batch_norms(model, _batches(entry, REFRESH_BATCHES, seed + 1, device))
    return model.eval()


def _groups(model: nn.Module) -> list[dict[str, object]]:
    """Decay matrices only: not norms, biases, tokens and positions."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim in (2, 4)]
    others = [parameter for parameter in model.parameters() if parameter.ndim not in (2, 4)]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, steps: int, warm_up: float) -> float:
    """Return the share of the peak rate: up in a line, down along a cosine."""
    warm = max(int(warm_up * steps), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _batches(entry: ModelEntry, steps: int, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    if entry.task in RENDERERS:
        for step in range(steps):
            yield RENDERERS[entry.task](entry.batch, seed_of(entry.task, "train", seed, f"step {step}"), device=device)
        return
    images, labels = make("digits", "train", DIGITS_TRAIN_COUNT, 0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (entry.batch,), generator=generator)
        yield _bent(images[chosen], generator).to(device), labels[chosen].to(device)


def _bent(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image under its own affine map near the identity, with noise: the digits are few."""
    paper = images.amin()
    maps = torch.eye(2, 3) + torch.tensor([0.2, 0.2, 0.15]) * torch.randn(len(images), 2, 3, generator=generator)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    bent = F.grid_sample(images - paper, grid, align_corners=False) + paper
    return bent + 0.2 * torch.randn(bent.shape, generator=generator)


def _refresh_batch_norms(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Take batch norm statistics once more with frozen weights, as a cumulative average over all batches.

    SLAB does this in ten epochs with the usual momentum, of which only the last batches count (Guo et al., 2024).
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def evaluate(model: nn.Module, task: str, count: int, *, device: str = "cpu") -> Score:
    """Return the model's top-1, or mean IoU for scenes, on the first ``count`` test images (seed 0)."""
    parts = [torch.split(tensor, 256) for tensor in make(task, "test", count, 0)]
    batches = (({"image": images.numpy()}, labels.numpy()) for images, labels in zip(*parts, strict=True))
    with torch.no_grad():
        return score(lambda inputs: model(torch.from_numpy(inputs["image"]).to(device)).cpu().numpy(), batches)


def export(name: str, state: dict[str, Tensor], folder: Path = WEIGHTS) -> Path:
    """Write the model as a torch.export archive with a dynamic batch and the input ``image``."""
    entry = MODELS[name]
    model = entry.build(entry.steps)
    model.load_state_dict(state)
    example = make(entry.task, "calib", 2, 0)[0].clone()  # the archive keeps whole storages, not slices of them
    batch = torch.export.Dim("batch")
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecations inside export
        program = torch.export.export(model.eval(), (example,), dynamic_shapes={"image": {0: batch}})
        _shorten_traces(program)
        torch.export.save(program, folder / f"{name}.pt2")
    return folder / f"{name}.pt2"


def _shorten_traces(program: torch.export.ExportedProgram) -> None:
    """Name source files from the repository's or the package's folder on: where these stood says nothing elsewhere."""
    for node in program.graph.nodes:
        if trace := node.meta.get("stack_trace"):
            node.meta["stack_trace"] = FOLDERS.sub("", trace)


def main() -> None:
    """Train, measure and export; with ``--states`` training and export can stand on two machines."""
    given = _arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in given.names:
        if given.export:
            print(export(name, load_file(given.states / f"{name}.safetensors")))
            continue
        model = train(name, device=device, steps=given.steps)
        task = MODELS[name].task
        found = evaluate(model, task, TEST_COUNT[task], device=device)
        print(f"{name}: {found.metric.title} {found.percent:.2f} %", flush=True)
        state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
        if given.states:
            given.states.mkdir(parents=True, exist_ok=True)
            save_file(state, given.states / f"{name}.safetensors")
        else:
            print(export(name, state))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--states", type=Path, help="write state dicts here, as safetensors, and no archives")
    parser.add_argument("--export", action="store_true", help="train nothing: make archives of the --states")
    parser.add_argument("--steps", type=int, help="train for fewer steps, to try things")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(MODELS)):
        parser.error(f"there is no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    if given.export and not given.states:
        parser.error("--export needs --states")
    return given


if __name__ == "__main__":
    main()
