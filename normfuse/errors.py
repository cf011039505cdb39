"""Every error a user can meet: what, where, what was expected, what to do; one class per kind."""

from __future__ import annotations

from typing import ClassVar, Final

__all__ = [
    "BadInput",
    "CheckFailed",
    "InternalError",
    "MissingDependency",
    "NormfuseError",
    "UnsupportedModel",
    "UsageError",
]

ISSUE_HINT: Final = "this is a bug in normfuse: please report it with the command and the output of `normfuse doctor`"


class NormfuseError(Exception):
    """The base of all errors raised on purpose; the text is made here and nowhere else."""

    exit_code: ClassVar[int] = 70

    def __init__(self, what: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at        {self.where}")
        if self.expected:
            lines.append(f"  expected  {self.expected}")
        if self.hint:
            lines.append(f"  try       {self.hint}")
        return "\n".join(lines)


class CheckFailed(NormfuseError):
    """A check or a guard did not hold; the artifact, if there is one, says which."""

    exit_code = 1


class UsageError(NormfuseError):
    """The command or the call itself is wrong."""

    exit_code = 2


class UnsupportedModel(NormfuseError):
    """The model is well formed, but normfuse cannot compile it."""

    exit_code = 3


class BadInput(NormfuseError):
    """A file or an array is broken, of the wrong kind, or not trusted."""

    exit_code = 4


class MissingDependency(NormfuseError):
    """A component that this job needs is not installed."""

    exit_code = 5

    def __init__(self, package: str, *, needed_for: str, install: str) -> None:
        self.package = package
        super().__init__(f"{package} is not installed", where=needed_for, hint=install)


class InternalError(NormfuseError):
    """normfuse itself is wrong."""

    exit_code = 70

    def __init__(self, what: str, *, where: str = "") -> None:
        super().__init__(what, where=where, hint=ISSUE_HINT)
