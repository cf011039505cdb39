"""Golden files for every test; see ``docs/writing-a-pass.md``."""

import os
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from normfuse.testing import Golden

GOLDENS = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    settings.register_profile("normfuse", deadline=None)  # a first call imports; time is for benchmarks
    settings.load_profile("normfuse")
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("CI never writes goldens: review them and commit them")


@pytest.fixture(autouse=True, scope="session")
def own_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines are signed with a key of the tests' own, not with that of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden of this test: ``tests/golden/<file without test_>/<test without test_>.txt``."""
    area = request.path.stem.removeprefix("test_")
    name = request.node.name.removeprefix("test_").replace("[", "-").rstrip("]")
    return Golden(GOLDENS / area / f"{name}.txt", update=bool(request.config.getoption("--update-golden")))


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    if op != "==" or not isinstance(right, Golden) or not isinstance(left, str):
        return None
    difference = unified_diff(right.text.splitlines(), left.splitlines(), str(right.path.name), "now", lineterm="")
    return ["the text differs from its golden (review it, then --update-golden)", *difference]
