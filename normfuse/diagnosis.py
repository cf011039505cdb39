"""Compares what is installed with what normfuse needs, and compiles and runs the smallest model once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any, Final

from normfuse.bench.environment import describe_environment
from normfuse.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import nn

    from normfuse.data import Samples

__all__ = ["Package", "diagnose"]

# As pyproject.toml writes them, and as its metadata spells the extras.
REQUIREMENT: Final = re.compile(
    r"(?P<name>[\w.-]+) *>= *(?P<least>[\d.]+)(?: *; *extra *== *[\"'](?P<extra>\w+)[\"'])?"
)
USES: Final = {
    "images": "folders of images",
    "zoo": "the zoo's data and training",
    "bench": "benchmarks on DeiT shapes",
}
BUILDERS: Final = ("tensorrt", "tensorrt-rtx", "torch-tensorrt")
"""As their packages are called."""

RELEASE: Final = re.compile(r"\d+(?:\.\d+)*")
WIDTH: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package that normfuse needs: ``found`` is None where it is not installed, ``extra`` empty where all need it."""

    name: str
    least: str
    found: str | None
    extra: str

    @property
    def is_enough(self) -> bool:
        """Whether it is installed and not too old."""
        return self.found is not None and _release(self.found) >= _release(self.least)

    def __str__(self) -> str:
        state = "not installed" if self.found is None else f"{self.found} is too old"
        use = (
            f"only for {USES[self.extra]}: pip install 'normfuse[{self.extra}]'" if self.extra else "normfuse needs it"
        )
        return f"{self.name}: {state}, {self.name}>={self.least} is needed ({use})"


def diagnose(progress: Progress | None = None) -> dict[str, Any]:
    """Return the environment, the placement for this processor, and what is missing or broken, as plain data.

    ``trial`` says how compiling and running a model of two layers ended; it is not tried while a package that every
    compile needs is missing. ``ok`` is whether nothing is missing but extras and the trial held.
    """
    environment = describe_environment()
    packages = list(_packages())
    missing = [str(package) for package in packages if not package.extra and not package.is_enough]
    if not packages:
        missing = ["normfuse itself is not installed, so what it needs is not known (pip install -e .)"]
    with (progress or Silent()).task("compiling and running a small model"):
        trial = {"ok": False, "detail": "not tried: packages are missing"} if missing else _try_a_compile()
    return {
        "ok": not missing and trial["ok"],
        "environment": environment.as_dict(),
        "placement": None if missing else _placement(environment.instruction_set),
        "packages": [asdict(package) for package in packages],
        "engines": _engines(),
        "missing": missing,
        "optional_missing": [str(package) for package in packages if package.extra and not package.is_enough],
        "trial": trial,
    }


def _engines() -> dict[str, str | None]:
    """Return the versions of what builds engines, and the GPU that PyTorch finds; None is what is not there."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**{name: _found(name) for name in BUILDERS}, "GPU": gpu}


def _packages() -> Iterator[Package]:
    """Yield what the project's metadata asks for, but not its developers' tools; nothing where there is no metadata."""
    try:
        lines = requires("normfuse") or []
    except PackageNotFoundError:
        return
    for line in lines:
        if (asked := REQUIREMENT.fullmatch(line)) and (asked["extra"] is None or asked["extra"] in USES):
            yield Package(
                name=asked["name"], least=asked["least"], found=_found(asked["name"]), extra=asked["extra"] or ""
            )


def _found(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, without what follows them (``+cpu``, ``rc1``)."""
    numbers = RELEASE.match(text)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def _placement(instruction_set: str) -> dict[str, str]:
    from normfuse.export.placement import onnx_placement

    placement = onnx_placement(instruction_set)
    return {
        "name": placement.name,
        "activations": str(placement.activation),
        "weights": str(placement.weight),
        "reason": placement.reason,
    }


def _try_a_compile() -> dict[str, Any]:
    try:
        return _compile_and_run()
    # Whatever a broken package raises, at import or later, is what is looked for here.
    except Exception as error:  # noqa: BLE001
        first = next(iter(str(error).strip().splitlines()), "")
        return {"ok": False, "detail": f"{type(error).__name__}: {first}"}


def _compile_and_run() -> dict[str, Any]:
    import numpy as np
    import torch

    from normfuse.compiler import compile as compile_model
    from normfuse.recipe import Recipe

    recipe = Recipe(benchmark=False, threads=1)
    built = compile_model(_model(), [torch.zeros(2, WIDTH)], calibration=_samples(), recipe=recipe)
    outputs = built.session(threads=1)(np.ones((3, WIDTH), dtype=np.float32))
    failed = [check["name"] for check in built.report["checks"] if not check["holds"]]
    if not all(np.isfinite(output).all() for output in outputs.values()):
        failed.append("finite outputs")
    detail = f"failed: {', '.join(failed)}" if failed else "compiled to 8 bits, run, and every check holds"
    return {"ok": not failed, "detail": detail}


def _model() -> nn.Module:
    import torch
    from torch import Tensor, nn

    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).relu())
            return y

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TwoLayers().eval()


def _samples() -> Samples:
    import numpy as np

    from normfuse.data import Samples
    from normfuse.data.samples import Sample

    rows = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32)
    return Samples(
        source="doctor",
        names=("x",),
        count=len(rows),
        read=lambda: (Sample({"x": row}, f"doctor, sample {index}") for index, row in enumerate(rows)),
    )
