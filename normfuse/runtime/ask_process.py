"""One question to a process of its own: a request file, an answer file, a limit of time, and an error for every end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfuse.errors import CheckFailed
from normfuse.runtime.build_failures import ended_process

__all__ = ["ask_process"]


def ask_process(
    program: Sequence[str],
    request: Mapping[str, Any],
    *,
    of: str,
    seconds: float,
    hint: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what a Python program answers to a request.

    Args:
        program: what Python runs; the request's file comes behind it.
        request: for JSON. ``answer`` is the file that the program writes, in a folder where the request may stand too;
            ``module`` the library that it is about.
        of: whose process it is, as errors call it.
        seconds: after which it is ended.
        hint: what to do where that is too short.
        environment: its variables; None: those of this process.

    Raises:
        MissingDependency: the library is not installed, or lacks a part of its own.
        CheckFailed: the process ended without an answer, or took too long.
    """
    answer = Path(request["answer"])
    asked = answer.with_name("request.json")
    asked.write_text(json.dumps(request), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, *program, str(asked)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(
            f"the {of} took more than {seconds:g} s",
            where=request["module"],
            expected="an answer within the time limit",
            hint=hint,
        ) from error
    if not answer.exists():
        raise ended_process(request["module"], done.returncode, done.stderr, of=of)
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found
