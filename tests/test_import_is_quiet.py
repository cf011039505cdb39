"""Importing any module prints nothing, touches no device, and registers nothing but torch operators."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

SCRIPT = """
import importlib, os, pathlib, sys, warnings
import torch, torch.export, torch.onnx
from torch.utils import _pytree

def touched(*args, **kwargs):
    raise AssertionError("CUDA was touched at import")

for name in ("init", "is_available", "device_count", "current_device", "get_device_name", "_lazy_init", "synchronize"):
    setattr(torch.cuda, name, touched)

OPTIONAL = ("tensorrt", "torch_tensorrt", "triton")
names = []
for path in sorted(pathlib.Path("normfuse").rglob("*.py")) + [
    each for folder in ("passes", "kernels", "cli") for each in sorted(pathlib.Path(folder).rglob("*.py"))
]:
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    names.append(".".join(parts if parts[0] == "normfuse" else ["normfuse", *parts]))

warnings.simplefilter("error")
environment, threads, generator = dict(os.environ), torch.get_num_threads(), torch.get_rng_state()
nodes, grad, dtype = set(_pytree.SUPPORTED_NODES), torch.is_grad_enabled(), torch.get_default_dtype()
for name in sorted(set(names)):
    try:
        with warnings.catch_warnings():
            # Other packages' deprecations at their own import are not ours.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
assert dict(os.environ).items() <= environment.items() | {("KMP_DUPLICATE_LIB_OK", "True")}, "environment changed"
assert torch.get_num_threads() == threads
assert torch.equal(torch.get_rng_state(), generator)
assert torch.is_grad_enabled() == grad and torch.get_default_dtype() == dtype
ours = {str(kind) for kind in set(_pytree.SUPPORTED_NODES) - nodes if kind.__module__.startswith("normfuse")}
assert not ours, ours
assert len(names) > 40, names
"""


def test_import_is_quiet() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    assert done.stderr == ""


def test_the_package_alone_is_light() -> None:
    script = "import sys, normfuse; assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
