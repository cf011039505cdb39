"""A module that passes for torch-tensorrt in the builder's process: its engine is what it was told, or it fails.

Names, arguments and errors are those of the source of torch-tensorrt 2.13.0. The real function swallows arguments that
it does not know; this one refuses them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from standin_tensorrt import look_in, with_constants

__all__ = ["VERSION", "install_torch_tensorrt", "told"]

VERSION: Final = "11.0.0.114"

LIBRARY: Final = """
import json, logging, os, time, types
import torch, torch.export.passes
import tensorrt
BEHAVIOUR = "builds"
GPU = "SM90"
RAISES = ""
tensorrt_package_name = "tensorrt"

if RAISES:
    raise eval(RAISES)

moves = []

def moved(program, place):
    moves.append(place)
    return program

torch.cuda.is_available = lambda: bool(GPU)
if GPU:
    torch.cuda.get_device_capability = lambda device: (int(GPU[2:-1]), int(GPU[-1]))
    torch.export.passes.move_to_device_pass = moved

class UnsupportedOperatorException(RuntimeError):
    pass

class Input:
    def __init__(self, *, dtype, **shapes):
        assert set(shapes) in ({"shape"}, {"min_shape", "opt_shape", "max_shape"}), shapes
        assert all(type(size) is int for shape in shapes.values() for size in shape), shapes
        self.told = {**shapes, "dtype": str(dtype)}
        self.usual = torch.full(shapes.get("opt_shape", shapes.get("shape")), 0.5).to(dtype)

def failed():
    builder = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")
    try:
        if BEHAVIOUR == "unsupported":
            raise UnsupportedOperatorException(
                "Conversion of function torch._ops.aten.aten::erfinv not currently supported!\\n\\nWhile executing %y"
            )
        if BEHAVIOUR in SAYS:
            builder.error(SAYS[BEHAVIOUR])
            assert None  # what it makes of a builder that gave nothing
    except UnsupportedOperatorException as error:
        raise UnsupportedOperatorException("Conversion of module GraphModule()\\n\\n\\n") from error
    except AssertionError as error:
        raise RuntimeError(f"While interpreting the module got an error: {error}") from error

SAYS = {
    "refuses": "Error Code 4: Internal Error (an engine is a wish)",
    "no memory": "Error Code 2: OutOfMemory (Requested size was 39856848 bytes.)",
}

def convert_exported_program_to_serialized_trt_engine(
    exported_program, *, arg_inputs, workspace_size, optimization_level, version_compatible, timing_cache_path,
    truncate_double, attn_bias_is_causal, immutable_weights=True,
):
    assert isinstance(exported_program, torch.export.ExportedProgram)
    if not GPU and BEHAVIOUR != "builds":
        raise RuntimeError("Found no NVIDIA driver on your system.")
    if BEHAVIOUR == "crashes":
        os.kill(os.getpid(), 11)
    if BEHAVIOUR == "hangs":
        time.sleep(60)
    failed()
    if BEHAVIOUR in ("none", "empty"):
        return None if BEHAVIOUR == "none" else b""
    logging.getLogger("torch_tensorrt.dynamo").warning("a warning\\nof two lines")
    logging.getLogger("somebody else").warning("another warning")
    with open(timing_cache_path, "ab") as cache:
        cache.write(b"+timed")
    answers = exported_program.module()(*[each.usual for each in arg_inputs])
    answers = answers if isinstance(answers, (tuple, list)) else [answers]
    options = dict(
        workspace_size=workspace_size, optimization_level=optimization_level, version_compatible=version_compatible,
        truncate_double=truncate_double, attn_bias_is_causal=attn_bias_is_causal, immutable_weights=immutable_weights,
    )
    told = dict(
        inputs=[each.told for each in arg_inputs], options=options, moves=moves, timings=timing_cache_path,
        outputs=[each.tolist() for each in answers],
    )
    return json.dumps(told).encode()

dynamo = types.SimpleNamespace(
    convert_exported_program_to_serialized_trt_engine=convert_exported_program_to_serialized_trt_engine
)
"""


def install_torch_tensorrt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str = "builds", **texts: str
) -> None:
    """Put the module, and the TensorRT that it imports, into a folder where this process and its children look.

    ``texts`` are constants of the module: ``GPU`` (empty: there is none), ``RAISES`` (the error of its import),
    ``tensorrt_package_name``.
    """
    library = with_constants(LIBRARY, BEHAVIOUR=behaviour, **texts)
    (folder / "torch_tensorrt.py").write_text(library, encoding="utf-8")
    (folder / "tensorrt.py").write_text(f"__version__ = {VERSION!r}\n", encoding="utf-8")
    look_in(folder, monkeypatch)


def told(engine: Path) -> dict[str, Any]:
    """Return what the module was told, and what the program computes of inputs of the usual shape full of 0.5."""
    found: dict[str, Any] = json.loads(engine.read_bytes())
    return found
