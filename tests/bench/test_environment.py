from __future__ import annotations

import getpass
import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from normfuse.bench import environment
from normfuse.bench.environment import default_threads, describe_environment


def test_it_names_versions_and_machine_but_neither_host_nor_user() -> None:
    found = describe_environment().as_dict()
    text = json.dumps(found, allow_nan=False)
    assert found["packages"]["numpy"] == version("numpy")  # type: ignore[index]  # a dict
    assert found["python"] == platform.python_version()
    assert found["cores"] >= 1  # type: ignore[operator]  # an int
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), platform.release()):
        assert private not in text
    assert getpass.getuser() not in text


def test_without_proc_and_packages_it_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", _no_file)
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    found = describe_environment()
    assert found.processor
    assert found.packages["no-such-package"] == "not installed"


def _no_file(*_: object, **__: object) -> str:
    raise FileNotFoundError


def test_threads_are_those_asked_for_or_two_at_most() -> None:
    assert default_threads(5) == 5
    assert 1 <= default_threads() <= 2
