"""What a processor can do with 8-bit integers."""

from __future__ import annotations

import platform
from enum import Enum
from functools import reduce
from pathlib import Path
from typing import Final

__all__ = ["InstructionSet", "detect_instruction_set"]


class InstructionSet(Enum):
    """The best 8-bit product of a processor, best first; the value is how placements and reports call it."""

    AMX = "amx"
    AVX512_VNNI = "avx512-vnni"
    AVX_VNNI = "avx-vnni"
    AVX2 = "avx2"
    NEON_DOT = "neon-dot"
    PORTABLE = "portable"


# Best first. AVX-512 without VNNI is no level of its own: its 8-bit products saturate like those of AVX2.
FLAGS: Final = (
    ("amx_int8", InstructionSet.AMX),
    ("avx512_vnni", InstructionSet.AVX512_VNNI),
    ("avx_vnni", InstructionSet.AVX_VNNI),
    ("avx2", InstructionSet.AVX2),
    ("asimddp", InstructionSet.NEON_DOT),
)


def detect_instruction_set(cpuinfo: str | None = None, machine: str | None = None) -> InstructionSet:
    """Return the level of this processor, or of the one described.

    Args:
        cpuinfo: the text of Linux' /proc/cpuinfo; None reads this machine's (empty on other systems).
        machine: the architecture (``platform.machine()``), asked where the text lists no flags.
    """
    flags = _flags(_read_cpuinfo() if cpuinfo is None else cpuinfo)
    for flag, level in FLAGS:
        if flag in flags:
            return level
    # Without the list of flags: every 64-bit ARM with macOS or Windows that onnxruntime supports has the dot
    # product; an x86 may lack VNNI, and PORTABLE is right on all of them.
    is_arm = (machine or platform.machine()).lower() in ("arm64", "aarch64")
    return InstructionSet.NEON_DOT if is_arm and not flags else InstructionSet.PORTABLE


def _flags(cpuinfo: str) -> frozenset[str]:
    """Return what all cores have: big and little cores may differ, and a thread may land on either."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    cores = [frozenset(flags.split()) for name, _, flags in lines if name.strip().lower() in ("flags", "features")]
    return reduce(frozenset.intersection, cores) if cores else frozenset()


def _read_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
