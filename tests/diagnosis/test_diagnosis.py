"""What doctor says of packages that are missing, old or broken, and of a compile that fails."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from click.testing import CliRunner

from normfuse import compiler, diagnosis
from normfuse.cli import doctor
from normfuse.diagnosis import Package, diagnose

ASKED = [
    *("torch>=2.11", "onnx >= 1.17", 'pillow>=10; extra == "images"', "matplotlib>=3.8 ; extra == 'zoo'"),
    *('normfuse[bench,images]; extra == "dev"', 'ruff>=0.9; extra == "dev"'),
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, in the eyes of the diagnosis; enough at first."""
    found = {"torch": "2.13.0+cpu", "onnx": "1.17", "pillow": "10.0", "matplotlib": "3.10.2"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(diagnosis, "requires", lambda _: ASKED)
    monkeypatch.setattr(diagnosis, "version", version)
    monkeypatch.setattr(diagnosis, "_compile_and_run", lambda: {"ok": True, "detail": "held"})
    return found


def test_enough_is_enough(installed: dict[str, str]) -> None:
    found = diagnose()
    assert found["ok"]
    assert found["missing"] == found["optional_missing"] == []
    names = [(each["name"], each["least"], each["extra"]) for each in found["packages"]]
    assert names == [
        ("torch", "2.11", ""),
        ("onnx", "1.17", ""),
        ("pillow", "10", "images"),
        ("matplotlib", "3.8", "zoo"),
    ]


def test_what_builds_and_runs_engines_is_told(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed["tensorrt-rtx"] = "1.7.1.116"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = diagnose()["engines"]
    assert found == {"tensorrt": None, "tensorrt-rtx": "1.7.1.116", "torch-tensorrt": None, "GPU": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert diagnose()["engines"]["GPU"] == "a GPU"


@pytest.mark.parametrize(
    ("version", "is_enough"), [("2.9.1", False), ("2.11", True), ("2.11.0rc1+cu", True), ("3", True)]
)
def test_versions_are_compared_as_numbers(version: str, is_enough: bool) -> None:
    assert Package(name="torch", least="2.11", found=version, extra="").is_enough == is_enough


def test_what_every_compile_needs_is_missing(installed: dict[str, str]) -> None:
    installed["torch"] = "2.9.1"
    del installed["onnx"]
    found = diagnose()
    assert not found["ok"]
    assert [text.partition(" (")[0] for text in found["missing"]] == [
        "torch: 2.9.1 is too old, torch>=2.11 is needed",
        "onnx: not installed, onnx>=1.17 is needed",
    ]
    assert not found["trial"]["ok"], "nothing may be tried with packages that are not there"
    done = CliRunner().invoke(doctor.command, ["--quiet"], standalone_mode=False)
    assert done.return_value == 5
    assert "fact" in done.stdout.splitlines()[2], "no column without a name"
    assert "torch: 2.9.1 is too old" in done.stdout


def test_an_extra_may_be_missing(installed: dict[str, str]) -> None:
    del installed["pillow"]
    found = diagnose()
    assert found["ok"]
    assert "pip install 'normfuse[images]'" in found["optional_missing"][0]


def test_a_source_tree_that_is_not_installed(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(diagnosis, "requires", requires)
    found = diagnose()
    assert not found["ok"]
    assert "not installed" in found["missing"][0]


def test_a_package_that_is_there_but_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ImportError("libonnxruntime.so: undefined symbol")

    monkeypatch.setattr(compiler, "compile", broken)
    found = diagnose()
    assert found["missing"] == []
    assert not found["ok"]
    assert found["trial"]["detail"] == "ImportError: libonnxruntime.so: undefined symbol"
    done = CliRunner().invoke(doctor.command, ["--quiet"], standalone_mode=False)
    assert done.return_value == 1
    assert "FAILED: ImportError" in done.stdout


@pytest.mark.slow
def test_the_trial_compiles_and_runs() -> None:
    found = diagnose()
    assert found["ok"], found["trial"]
    assert found["placement"]["name"].startswith("onnxruntime")
    assert "every check holds" in found["trial"]["detail"]
