"""Who reads the output may leave: nothing is said about it, and the exit code stays the command's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from normfuse.artifact import ArtifactWriter


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    (tmp_path / "built.onnx").write_bytes(b"onnx")
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.add_file(tmp_path / "built.onnx", "model.onnx")
        writer.finish({})
    return tmp_path / "out"


def run(*arguments: object, closed: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with one of its streams closed at the other end."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", "normfuse.cli.main", *map(str, arguments)],
            stdout=writer if closed == "stdout" else subprocess.PIPE,
            stderr=writer if closed == "stderr" else subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_a_command_keeps_its_exit_code(artifact: Path, options: list[str]) -> None:
    done = run("verify", artifact, *options, closed="stdout")
    assert (done.returncode, done.stderr) == (0, "")
    (artifact / "model.onnx").write_bytes(b"changed")
    done = run("verify", artifact, *options, closed="stdout")
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["--version"]])
def test_help_that_nobody_reads_is_no_failure(arguments: list[str]) -> None:
    done = run(*arguments, closed="stdout")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path: Path) -> None:
    done = run("verify", tmp_path, closed="stderr")
    assert (done.returncode, done.stdout) == (4, "")
