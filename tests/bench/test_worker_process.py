from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from normfuse.bench.memory import memory_use
from normfuse.bench.worker_process import EngineSpec, Load, WorkerProcess
from normfuse.errors import CheckFailed

Write = Callable[..., Path]

ONE = Load(batch=2, threads=1)


def spec(path: Path) -> EngineSpec:
    return EngineSpec("it", "onnxruntime", path)


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def identifier(worker: WorkerProcess) -> int:
    return worker._process.pid


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_worker_runs_and_is_gone_afterwards(linear: Path) -> None:
    with WorkerProcess(spec(linear), ONE) as worker:
        worker.warm_up(3)
        times = worker.run(5)
        process = identifier(worker)
    assert len(times) == 5
    assert all(value > 0 for value in times)
    assert is_gone(process)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_idle_worker_uses_no_processor(tmp_path: Path, write_linear: Write) -> None:
    path = write_linear(tmp_path / "wide.onnx", inner=512, layers=4)
    with WorkerProcess(spec(path), Load(batch=256, threads=2)) as worker:
        worker.warm_up(20)
        before = cpu_seconds(identifier(worker))
        time.sleep(0.5)
        used = cpu_seconds(identifier(worker)) - before
    # /proc counts ticks of 10 ms; spinning threads would have used half a second.
    assert used <= 0.05


@contextmanager
def soon(act: object, *arguments: int) -> Iterator[None]:
    timer = threading.Timer(0.3, act, arguments)  # type: ignore[arg-type]  # a callable
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_a_worker_that_is_killed_is_a_failed_check(tmp_path: Path, write_linear: Write) -> None:
    path = write_linear(tmp_path / "wide.onnx", inner=256, layers=3)
    with (
        WorkerProcess(spec(path), Load(batch=64, threads=1)) as worker,
        soon(os.kill, identifier(worker), signal.SIGKILL),
        pytest.raises(CheckFailed, match="signal 9"),
    ):
        worker.run(1_000_000)


def test_a_worker_that_does_not_answer_is_a_failed_check(tmp_path: Path, write_linear: Write) -> None:
    path = write_linear(tmp_path / "wide.onnx", inner=256, layers=3)
    with WorkerProcess(spec(path), Load(batch=64, threads=1)) as worker:
        process = identifier(worker)
        with pytest.raises(CheckFailed, match=r"did not answer within 0\.25 s"):
            worker.run(1_000_000, timeout=0.25)
        assert is_gone(process) or worker._process.poll() is not None


def test_a_turn_is_as_long_as_asked_within_limits_on_its_runs(linear: Path) -> None:
    with WorkerProcess(spec(linear), ONE) as worker:
        started = time.monotonic()
        many = worker.run(2, lasting=0.2)
        assert time.monotonic() - started >= 0.2
        assert sum(many) <= 200 + max(many)
        assert len(worker.run(3, lasting=30.0, most=4)) == 4
        assert len(worker.run(3, lasting=0.0, most=4)) == 3


def test_the_interrupt_of_the_terminal_is_left_to_the_parent(linear: Path) -> None:
    with WorkerProcess(spec(linear), ONE) as worker:
        os.kill(identifier(worker), signal.SIGINT)
        assert len(worker.run(1)) == 1


def test_an_error_in_the_parent_leaves_no_process(linear: Path) -> None:
    worker = WorkerProcess(spec(linear), ONE)
    with pytest.raises(KeyboardInterrupt), worker:
        raise KeyboardInterrupt
    assert is_gone(identifier(worker))


def test_a_worker_ends_when_its_parent_does(linear: Path) -> None:
    parent = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from normfuse.bench.worker_process import EngineSpec, Load, WorkerProcess\n"
        "worker = WorkerProcess(EngineSpec('it', 'onnxruntime', Path(sys.argv[1])), Load(batch=1, threads=1))\n"
        "worker.__enter__()\n"
        "print(worker._process.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", parent, str(linear)], capture_output=True, text=True, check=True)
    process = int(ended.stdout)
    deadline = time.monotonic() + 10
    while not (is_gone(process) or "\nState:\tZ" in Path(f"/proc/{process}/status").read_text(encoding="utf-8")):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def test_a_batch_that_the_model_cannot_take_is_said(tmp_path: Path, write_linear: Write) -> None:
    path = write_linear(tmp_path / "fixed.onnx", batch=3)
    with pytest.raises(CheckFailed, match="the model takes batches of 3 only"), WorkerProcess(spec(path), ONE):
        pass


def test_inputs_come_from_a_file_and_are_repeated_to_the_batch(tmp_path: Path, linear: Path) -> None:
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, x=np.zeros((3, 5)), label=np.arange(3))
    with WorkerProcess(spec(linear), Load(batch=7, threads=1, inputs=inputs)) as worker:
        assert worker.shapes == {"x": (7, 5)}
        assert len(worker.run(2)) == 2


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], *, scale: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(pair[0]) * scale + pair[1]
        return out


@pytest.mark.slow
def test_a_torch_archive_runs_eagerly_with_its_inputs_nested_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "nested.pt2"
    pair = (torch.randn(2, 5), torch.randn(2, 3))
    torch.export.save(torch.export.export(Nested().eval(), (pair,), {"scale": torch.randn(3)}), path)
    with WorkerProcess(EngineSpec("eager", "torch", path), ONE) as worker:
        assert sorted(worker.shapes.values()) == [(2, 3), (2, 5), (3,)]
        assert len(worker.run(2)) == 2


@pytest.mark.slow
def test_a_pickle_is_not_opened_as_a_torch_engine(tmp_path: Path) -> None:
    path = tmp_path / "pickled.pt"
    torch.save(nn.Linear(5, 3), path)
    with pytest.raises(CheckFailed), WorkerProcess(EngineSpec("eager", "torch", path), ONE):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_grows_with_the_weights_and_not_with_the_parent(tmp_path: Path, write_linear: Write) -> None:
    small = memory_use(spec(write_linear(tmp_path / "small.onnx")), batch=1, threads=1)
    # 8 layers of 1024 x 1024 float32: 32 MiB of weights.
    large = memory_use(spec(write_linear(tmp_path / "large.onnx", inner=1024, layers=9)), batch=1, threads=1)
    assert 0 < small.before_load < small.after_load <= small.peak
    assert large.peak - small.peak >= 32 * 2**20
    assert abs(large.before_load - small.before_load) < 8 * 2**20
    # What the parent holds (128 MiB) is not counted.
    ballast = np.ones(2**24)
    beside = memory_use(spec(tmp_path / "small.onnx"), batch=1, threads=1)
    assert abs(beside.peak - small.peak) < 32 * 2**20
    assert ballast[0] == 1
