"""What a peer is asked and what it answers; read on both sides, so it needs nothing but numpy."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

__all__ = ["ANSWER", "LOGITS", "Answer", "Floats", "Order", "Quantized", "obey"]

Floats = npt.NDArray[np.float32]

ANSWER = "answer.json"
LOGITS = "logits.npy"
BATCH = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One model to quantize and run.

    Attributes:
        model: its name in the zoo, for peers that trace a module.
        archive: the trained model as a torch.export archive.
        onnx: the same in float, as ``torch.onnx.export`` writes it.
        weight_bits: bits of the weights.
        activation_bits: bits of the activations.
        setting: which of the peer's ways to use.
        samples: an .npz with ``image``, the calibration samples.
        test: an .npz with ``image``, what to predict; it has no labels.
        output: the folder for the answer.
        seed: for whatever the peer draws at random.
    """

    model: str
    archive: str
    onnx: str
    weight_bits: int
    activation_bits: int
    setting: str
    samples: str
    test: str
    output: str
    seed: int = 0

    def write(self, stream: IO[str]) -> None:
        """Write the order as JSON."""
        json.dump(asdict(self), stream)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized model: ``run`` gives logits for images, ``tensors`` says which tensors have codes."""

    run: Callable[[Floats], npt.NDArray[np.generic]]
    tensors: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer says beside its logits: its version, which tensors have codes, how long quantizing took."""

    version: str
    tensors: str
    seconds: float

    @classmethod
    def read(cls, folder: Path) -> Answer:
        """Return the answer in ``folder``."""
        return cls(**json.loads((folder / ANSWER).read_text(encoding="utf-8")))


def obey(package: str, quantize: Callable[[Order, Floats], Quantized]) -> None:
    """Quantize and run what standard input orders, with the peer ``package``; write logits and answer.

    Whatever the libraries print goes to standard error.
    """
    os.dup2(2, 1)
    order = Order(**json.load(sys.stdin))
    random.seed(order.seed)
    np.random.seed(order.seed)
    with np.load(order.samples) as found:
        samples = found["image"]
    started = time.perf_counter()
    quantized = quantize(order, samples)
    seconds = time.perf_counter() - started
    with np.load(order.test) as found:
        images = found["image"]
    logits = [np.asarray(quantized.run(images[at : at + BATCH])) for at in range(0, len(images), BATCH)]
    folder = Path(order.output)
    np.save(folder / LOGITS, np.concatenate(logits))
    answer = Answer(version(package), quantized.tensors, seconds)
    (folder / ANSWER).write_text(json.dumps(asdict(answer)), encoding="utf-8")
