"""Asks a peer in its own process; what comes back is logits, which it never compares with labels."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.peers.environment import PeerMissing, last_line, python_of
from benchmarks.peers.order import LOGITS, Answer, Floats, Order

__all__ = ["PEERS", "REPOSITORY", "Peer", "PeerMissing", "ask"]

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another tool.

    Attributes:
        module: the worker's module, run with ``-m`` in the repository's root.
        requirements: what its environment has; None: it runs in this one.
        settings: by bits, the ways of using it that are compared; without an entry it has none for these bits.
    """

    module: str
    requirements: Path | None = None
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


PEERS: dict[str, Peer] = {
    "nncf": Peer(
        module="benchmarks.peers.nncf",
        requirements=HERE / "nncf.txt",
        settings={"8": ("fast bias correction", "bias correction")},
    ),
    "onnxruntime": Peer(
        module="benchmarks.peers.onnxruntime_static",
        settings={"8": ("all operators, min-max", "products, min-max", "products, entropy")},
    ),
    "torchao": Peer(
        module="benchmarks.peers.torchao", requirements=HERE / "torchao.txt", settings={"8": ("PT2E, x86 default",)}
    ),
    "brevitas": Peer(
        module="benchmarks.peers.brevitas",
        requirements=HERE / "brevitas.txt",
        settings={
            "8": ("GPTQ, symmetric", "GPTQ, asymmetric"),
            "w4a4": (
                "GPTQ, symmetric",
                "GPTQ, asymmetric",
                "learned rounding, asymmetric",
                "learned rounding, asymmetric, ends at 8 bits",
            ),
        },
    ),
}


def ask(name: str, peer: Peer, order: Order, *, limit: float = 3600.0) -> tuple[Floats, Answer]:
    """Return the peer's logits for the test images, and what it says about them.

    Args:
        name: how the peer is called.
        peer: which one.
        order: what it shall do; its answer comes into ``order.output``.
        limit: after so many seconds it is given up.

    Raises:
        PeerMissing: it cannot be installed, fails, takes too long, or leaves no answer.
    """
    python = Path(sys.executable) if peer.requirements is None else python_of(name, peer.requirements)
    text = io.StringIO()
    order.write(text)
    command = [str(python), "-m", peer.module]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command,
            input=text.getvalue(),
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
            env=environment,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise PeerMissing(f"{name} took more than {limit:.0f} s") from None
    if done.returncode:
        raise PeerMissing(f"{name} failed: {last_line(done.stderr)}")
    folder = Path(order.output)
    try:
        return np.load(folder / LOGITS), Answer.read(folder)
    except (OSError, ValueError, TypeError) as error:
        raise PeerMissing(f"{name} left no answer: {error}") from error
