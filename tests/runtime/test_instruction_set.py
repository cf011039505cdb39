from __future__ import annotations

import pytest

from normfuse.runtime.instruction_set import InstructionSet, detect_instruction_set


def x86(flags: str, cores: int = 2) -> str:
    name = "model name\t: avx2 avx512_vnni special edition"
    core = f"processor\t: 0\n{name}\nflags\t\t: fpu sse2 {flags}\nbugs\t\t: amx_int8\n"
    return "\n".join([core] * cores)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        pytest.param(x86("avx2 avx512f avx512_vnni avx_vnni amx_tile amx_int8"), InstructionSet.AMX, id="amx"),
        pytest.param(x86("avx2 avx_vnni avx512f avx512_vnni"), InstructionSet.AVX512_VNNI, id="avx512-vnni first"),
        pytest.param(x86("avx2 avx_vnni"), InstructionSet.AVX_VNNI, id="avx-vnni"),
        pytest.param(x86("avx2 avx512f avx512bw"), InstructionSet.AVX2, id="avx512 without vnni"),
        pytest.param(x86("sse4_1 avx"), InstructionSet.PORTABLE, id="old; name and bugs are no flags"),
        pytest.param("Features\t: fp asimd asimddp\n", InstructionSet.NEON_DOT, id="arm with dot product"),
        pytest.param("Features\t: fp asimd\n", InstructionSet.PORTABLE, id="arm without"),
        pytest.param(
            "Features: asimd asimddp\n\nFeatures: asimd\n", InstructionSet.PORTABLE, id="little cores without"
        ),
    ],
)
def test_levels_from_linux_text(cpuinfo: str, expected: InstructionSet) -> None:
    assert detect_instruction_set(cpuinfo, machine="aarch64") is expected


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("arm64", InstructionSet.NEON_DOT),
        ("ARM64", InstructionSet.NEON_DOT),
        ("x86_64", InstructionSet.PORTABLE),
        ("riscv64", InstructionSet.PORTABLE),
    ],
)
def test_without_a_list_of_flags_the_architecture_decides(machine: str, expected: InstructionSet) -> None:
    assert detect_instruction_set("", machine=machine) is expected


def test_this_machine_has_a_level() -> None:
    assert detect_instruction_set() in InstructionSet
