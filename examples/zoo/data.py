"""The zoo's data: ``python -m examples.zoo.data TASK --split SPLIT --count N --seed S -o FILE.npz``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.zoo import glyphs, scenes

__all__ = ["RENDERERS", "SPLITS", "TASKS", "main", "make"]

TASKS = ("glyphs", "digits", "glyph-scenes")
SPLITS = ("train", "calib", "test")
CHUNK = 256
RENDERERS = {"glyphs": glyphs.render, "glyph-scenes": scenes.render}
DIGITS_CUTS = {"train": (0.0, 0.6), "calib": (0.6, 0.8), "test": (0.8, 1.0)}


def make(task: str, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (float32, [count, 1, height, width]) and labels (int64, [count]; a map of them for scenes).

    A smaller count gives the first images of a larger one. Splits are disjoint: glyphs and scenes of them are drawn
    from different seeds, digits are cut once into three parts.

    Raises:
        ValueError: the task or split is unknown, or digits has fewer images than asked for.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"there is no {task} {split}; tasks: {TASKS}, splits: {SPLITS}")
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    return _digits(split, count, seed) if task == "digits" else _drawn(task, split, count, seed)


def _drawn(task: str, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    seeds = [glyphs.seed_of(task, split, seed, start) for start in range(0, count, CHUNK)]
    chunks = [RENDERERS[task](CHUNK, chunk_seed) for chunk_seed in seeds]
    return torch.cat([images for images, _ in chunks])[:count], torch.cat([labels for _, labels in chunks])[:count]


def _digits(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's handwritten digits (1,797 images of 8 x 8), 60 % train, 20 % calib, 20 % test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))  # one cut for ever, whatever the seed
    first, last = (int(cut * len(order)) for cut in DIGITS_CUTS[split])
    if count > last - first:
        raise ValueError(f"digits has {last - first} {split} images, not {count}")
    chosen = np.random.default_rng(seed).permutation(order[first:last])[:count]
    images = (found.images[chosen].astype(np.float32)[:, None] - 8.0) / 4.0
    return torch.from_numpy(images), torch.from_numpy(found.target[chosen].astype(np.int64))


def main() -> None:
    """Write ``image`` and ``label`` to an .npz file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    try:
        images, labels = make(given.task, given.split, given.count, given.seed)
    except ValueError as error:
        parser.error(str(error))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(given.output, image=images.numpy(), label=labels.numpy())
    print(f"{given.output}: {len(labels)} images of {given.task}, {given.split}, seed {given.seed}")


if __name__ == "__main__":
    main()
