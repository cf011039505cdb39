"""A clear error for every way in which a builder gives no engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from normfuse.errors import BadInput, CheckFailed, MissingDependency, NormfuseError, UnsupportedModel, UsageError

__all__ = ["ended_process", "refuse_failure"]

SHOWN: Final = 3
"""Messages of a builder that an error repeats: the last ones."""

OF_PROFILE: Final = re.compile(r"optimization profile|\bprofile [0-9]", re.IGNORECASE)
OF_MEMORY: Final = re.compile(r"workspace|out ?of ?memory|insufficient memory", re.IGNORECASE)
"""As TensorRT 8 to 11 and TensorRT-RTX put it in their errors."""


def refuse_failure(answer: Mapping[str, Any], flavour: str) -> None:
    """Return only if an engine was built; ``flavour`` is the module of the library that runs it.

    Raises:
        BadInput: the timing cache is none that the library takes.
        MissingDependency: there is no driver.
        UsageError: capabilities that the library does not build for, or shapes that are missing or do not fit.
        UnsupportedModel: the library refuses nodes, has too little workspace, or gives no engine.
    """
    builder = f"{flavour} {answer['version']}"
    match answer["outcome"]:
        case "built":
            return
        case "no builder":
            raise MissingDependency(
                "a driver of the GPU",
                needed_for=f"the builder of {flavour} ({_last(answer['messages'])})",
                install="a machine with one",
            )
        case "no such capability":
            raise _no_such_capability(builder, answer["known"])
        case "no timing cache":
            raise BadInput(
                "the timing cache is of another version or GPU, or no timing cache",
                where=builder,
                expected="a file that a build by this version on this GPU has written, or a new one",
                hint="another --timing-cache, or remove the file if it is one",
            )
        case "refused":
            raise _refused(builder, answer["refusals"])
        case "not converted":
            raise UnsupportedModel(
                f"torch-tensorrt does not convert the model: {answer['messages'][-1]}",
                where=builder,
                expected="operators that it has converters for: it builds one engine of the whole model, or none",
                hint="leave --via out: the engine is then built from the ONNX file",
            )
        case _:
            raise _not_built(builder, answer)


def ended_process(module: str, return_code: int, said: str, *, of: str = "builder") -> NormfuseError:
    """Return the error of a process that ended without an answer; ``said`` is its standard error."""
    if (reason := _unloaded(said)) is not None:
        return MissingDependency(
            f"what {module} loads",
            needed_for=f"the {of} of {module} ({reason})",
            install="see the library's installation guide",
        )
    ended = f"signal {-return_code}" if return_code < 0 else f"exit code {return_code}"
    return CheckFailed(
        f"the {of}'s process ended with {ended}",
        where=module,
        expected="an answer, or an error",
        hint=f"the ONNX file is as it was; the process last said: {_last(said.splitlines())}",
    )


def _no_such_capability(builder: str, known: Sequence[str]) -> UsageError:
    if not known:
        return UsageError(
            f"{builder} builds for the GPU at hand alone",
            where="compute capabilities",
            expected="none",
            hint="leave them out and build on the GPU that shall run the engine, or take TensorRT-RTX",
        )
    return UsageError(
        f"{builder} does not build for a compute capability that was asked for",
        where="compute capabilities",
        expected=f"some of {', '.join(known)}",
    )


def _refused(builder: str, refusals: Sequence[Mapping[str, str]]) -> UnsupportedModel:
    lines = [f"{each['node'] or each['operator']}: {each['says']}" for each in refusals]
    return UnsupportedModel(
        f"the parser refuses {len(lines)} node{'s' * (len(lines) > 1)}",
        where="; ".join(lines[:SHOWN]),
        expected=f"what {builder} builds",
        hint="normfuse inspect --lint trt names the rules and what to do",
    )


def _not_built(builder: str, answer: Mapping[str, Any]) -> NormfuseError:
    errors = answer["errors"]
    if of_profile := [text for text in errors if OF_PROFILE.search(text)]:
        return UsageError(
            f"shapes are missing or do not fit: {_last(of_profile)}",
            where=builder,
            expected="the smallest, the usual and the largest shape of every input with a free axis",
            hint="--shapes NAME=SMALLEST,USUAL,LARGEST, as in --shapes image=1x3x224x224,8x3x224x224,32x3x224x224",
        )
    if of_memory := [text for text in errors if OF_MEMORY.search(text)]:
        return UnsupportedModel(
            f"the builder ran out of workspace: {_last(of_memory)}",
            where=builder,
            expected="kernels that do with the workspace given and the GPU's free memory",
            hint="more workspace, or smaller largest shapes (--shapes)",
        )
    return UnsupportedModel(
        f"the builder gave no engine: {_last(answer['messages'])}",
        where=builder,
        expected="an engine",
        hint="shapes for every free axis (--shapes), more workspace, or another GPU, as the message has it",
    )


def _unloaded(said: str) -> str | None:
    """Return the error of a module that could not be loaded: a library of it is missing."""
    lines = [line for line in said.splitlines() if line.startswith(("ImportError", "ModuleNotFoundError"))]
    return lines[-1].partition(": ")[2] if lines else None


def _last(messages: Sequence[str]) -> str:
    return " / ".join(messages[-SHOWN:]) or "nothing"
