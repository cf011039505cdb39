"""SIGTERM (``timeout``, containers, schedulers) ends a compile without leaving its files behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from examples.zoo.train import WEIGHTS

PATIENCE = 120.0
"""Seconds until the first file on the way must be there."""


@pytest.mark.slow
def test_what_is_terminated_leaves_nothing_on_the_way(tmp_path: Path) -> None:
    samples, aside = tmp_path / "samples.npz", tmp_path / "tmp"
    np.savez(samples, image=np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32))
    aside.mkdir()
    command = ["compile", WEIGHTS / "digits_vit_ln.pt2", "--calib", samples, "-o", tmp_path / "out", "--bits", "w3a3"]
    environment = {**os.environ, "TMPDIR": str(aside), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [sys.executable, "-m", "normfuse.cli.main", *map(str, command)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    until = time.monotonic() + PATIENCE
    resume = tmp_path / "out.resume"
    while not (resume.is_dir() and list(aside.glob("normfuse-*"))) and time.monotonic() < until:
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=PATIENCE)
    assert running.returncode == 143
    assert "out.resume holds what is finished" in told
    assert not list(aside.glob("normfuse-*"))
    assert not (tmp_path / "out").exists()
