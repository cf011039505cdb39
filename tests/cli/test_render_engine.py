"""What the terminal and the page say of a target with a builder: whatever of it is known."""

from __future__ import annotations

from typing import Any

import pytest

from normfuse.bench.gpu_timing import Turn, summary
from normfuse.cli import render, render_engine
from normfuse.page import render_page
from normfuse.page_target import target_parts

FINDING = {
    "level": "warning",
    "rule": "block-size",
    "layer": "head",
    "says": "one block",
    "mend": "two blocks",
    "detail": "",
}
AUDIT: dict[str, Any] = {
    "kernels": 55,
    "products": {"int8": {"asked": 3, "got": 2}, "fp16": {"asked": 1, "got": 1}},
    "mismatched": [{"layer": "up", "asked": "int8", "got": ["Half", "Half"]}],
    "norms": 9,
    "joined_norms": 8,
    "attentions": 4,
    "joined_attentions": 3,
    "alone": ["up/QuantizeLinear"],
}
ENGINE: dict[str, Any] = {
    "flavour": "tensorrt_rtx",
    "version": "1.7.1.116",
    "via": "onnx",
    "capabilities": ["SM89"],
    "bytes": 4040108,
    "messages": [],
    "audit": AUDIT,
}
FOUND: dict[str, Any] = {
    "products": [
        {"layer": "up", "operator": "Gemm", "type": "int8", "has_weight": True},
        {"layer": "down", "operator": "Gemm", "type": "int8", "has_weight": True},
        {"layer": "down", "operator": "Gemm", "type": "int8", "has_weight": True},
        {"layer": "", "operator": "MatMul", "type": "fp16", "has_weight": False},
    ],
    "lint": [FINDING],
    "body": {
        "type": "fp16",
        "nodes": 73,
        "usual_float32": {"LayerNormalization": 9, "Softmax": 4},
        "float32": [{"layer": "blocks.0", "operator": "Mul", "reason": "values up to 1e+06"}],
    },
    "commands": {
        "build": "trtexec --onnx=model.onnx",
        "build_rtx": "polygraphy convert",
        "time": "trtexec --loadEngine=model.engine",
        "compare": "polygraphy run",
    },
    "engine": ENGINE,
}


def told(**changes: Any) -> list[str]:
    return list(render_engine.target({**FOUND, **changes}))


def test_types_have_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    shown = render_engine.products(FOUND)
    assert shown is not None
    assert [tuple(row) for row in shown.rows] == [("int8", 3, "up, down"), ("fp16", 1, "MatMul")]
    render.table(*shown)
    assert "up, down" in capsys.readouterr().out
    assert render_engine.products({**FOUND, "products": []}) is None
    assert render_engine.products({}) is None


def test_many_layers_are_not_all_named() -> None:
    products = [{"layer": f"blocks.{at}.up", "operator": "Gemm", "type": "int8"} for at in range(8)]
    shown = render_engine.products({"products": products})
    assert shown is not None
    assert shown.rows[0][2] == "blocks.0.up, blocks.1.up, blocks.2.up, blocks.3.up, blocks.4.up and 3 more"


def test_everything_that_is_known_is_said() -> None:
    assert told() == [
        "body: 73 nodes in fp16; in float32: LayerNormalization 9, Softmax 4",
        "  blocks.0 (Mul) stays in float32: values up to 1e+06",
        "lint: 1 warning",
        "  block-size at head: one block; two blocks",
        "engine: 4,040,108 bytes by tensorrt_rtx 1.7.1.116 via onnx for SM89",
        "  55 kernels; products: 2 of 3 in int8, 1 of 1 in fp16",
        "  norms: 8 of 9 share a kernel with a sum or a quantizer",
        "  attention: 3 of 4 are one kernel",
        "  quantizers with a kernel of their own: up/QuantizeLinear",
        "  up: int8 was asked for, its kernel reads Half, Half",
        "  build with TensorRT 11: trtexec --onnx=model.onnx",
        "  build with TensorRT-RTX: polygraphy convert",
        "  time with TensorRT: trtexec --loadEngine=model.engine",
        "  compare with TensorRT: polygraphy run",
    ]


def test_a_float_body_has_no_line() -> None:
    assert told(body=None)[0] == "lint: 1 warning"
    plain = {"type": "fp16", "nodes": 3, "usual_float32": {}, "float32": []}
    assert told(body=plain)[0] == "body: 3 nodes in fp16"


def test_findings_are_counted_by_their_level_and_the_first_are_told() -> None:
    assert told(lint=[])[2] == "lint: no findings"
    lines = told(lint=[FINDING] * 6 + [{**FINDING, "level": "error"}])
    assert lines[2] == "lint: 6 warnings, 1 error"
    assert lines[3:8] == ["  block-size at head: one block; two blocks"] * 5
    assert lines[8] == "  and 2 more: normfuse inspect --lint trt names them"


def test_without_an_engine_the_reason_is_said() -> None:
    assert "engine: none was asked for" in told(engine=None)
    failure = {"what": "tensorrt is not installed", "at": "building engines", "try": "pip install it"}
    lines = told(engine=None, failure=failure)
    assert "engine: none, tensorrt is not installed" in lines
    assert lines[-4] == "  build with TensorRT 11: trtexec --onnx=model.onnx", "the commands build it elsewhere"


def test_a_builder_that_lists_no_kernels() -> None:
    lines = told(engine={**ENGINE, "audit": None, "capabilities": []})
    assert "engine: 4,040,108 bytes by tensorrt_rtx 1.7.1.116 via onnx for RTX GPUs from Ampere on" in lines
    assert "  the builder listed no kernels: nothing is known of what it fused" in lines


def test_a_product_that_no_kernel_names() -> None:
    audit = {
        **AUDIT,
        "norms": 0,
        "attentions": 0,
        "alone": [],
        "mismatched": [{"layer": "up", "asked": "int8", "got": None}],
    }
    lines = told(engine={**ENGINE, "audit": audit})
    assert lines[5:7] == [
        "  55 kernels; products: 2 of 3 in int8, 1 of 1 in fp16",
        "  up: int8 was asked for, no kernel names it",
    ]


def test_the_page_has_the_same() -> None:
    page = render_page({"tensorrt": FOUND})
    for text in (
        *(
            "Products",
            "up, down",
            "MatMul",
            "Float32 beside a body of fp16",
            "values up to 1e+06",
            "Linter: 1 finding<",
        ),
        *("block-size", "two blocks", "<h2>Engine</h2>", "4,040,108", "SM89", "8 of 9", "up/QuantizeLinear"),
        *("Other kernels than asked for", "Half, Half", "Commands", "trtexec --loadEngine=model.engine"),
    ):
        assert text in page, text


def test_the_page_says_why_there_is_no_engine() -> None:
    failure = {"what": "<b>tensorrt</b> is not installed", "at": "building engines", "try": "pip install it"}
    page = render_page({"tensorrt": {**FOUND, "engine": None, "failure": failure, "body": None, "lint": []}})
    for text in ("Engine: none", "&lt;b&gt;tensorrt&lt;/b&gt; is not installed", "Linter: no findings"):
        assert text in page, text
    assert "<h2>Engine</h2>" not in page


@pytest.mark.parametrize("left_out", list(FOUND))
def test_every_part_of_the_page_is_optional(left_out: str) -> None:
    assert "</html>" in render_page({"tensorrt": {name: part for name, part in FOUND.items() if name != left_out}})
    assert "</html>" in render_page({"tensorrt": {left_out: FOUND[left_out]}})


def ran(factor: float) -> dict[str, Any]:
    """Return what is measured of 100 inferences of 0.01 to 1 ms times a factor."""
    times = [factor * count / 100 for count in range(1, 101)]
    return summary([Turn(compute=times, enqueue=[0.25], alone=[2.0], wall=sum(times))])


RUN: dict[str, Any] = {
    "device": {"name": "a GPU", "type": "cuda"},
    "engines": [
        {
            "label": "int8",
            "inputs": {"image": [8, 3, 32, 32], "mask": [8]},
            "output_error": 0.0123,
            "allowed_error": 0.03125,
            "graph": ran(1.0),
            "plain": ran(2.0),
            "no_graph": "",
            "against_first": None,
        }
    ],
}


def test_an_engine_that_ran() -> None:
    lines = list(render_engine.target({**FOUND, "engine": ENGINE, "run": RUN}))
    for text in (
        "  GPU compute on a GPU, as a CUDA graph: median 0.505 ms, p99 0.990 ms",
        "  GPU compute on a GPU, plain: median 1.010 ms, p99 1.980 ms",
        "  image 8x3x32x32, mask 8: outputs differ from onnxruntime's by 0.012 of the largest (at most 0.031)",
    ):
        assert text in lines
    assert not [text for text in lines if "no CUDA graph" in text]


def test_engines_that_ran_side_by_side() -> None:
    other = {**RUN["engines"][0], "label": "fp8", "graph": None, "no_graph": "it waits", "against_first": 0.5}
    shown = render_engine.runs({**RUN, "engines": [*RUN["engines"], other]})
    assert shown.title == "GPU compute on a GPU"
    assert shown.rows == [
        ("int8", "0.505", "0.990", "1.010", "1.980", "0.250", "1,980", ""),
        ("fp8", "", "", "1.010", "1.980", "0.250", "990", "0.50x"),
    ]
    assert list(render_engine.closeness(other))[-1] == "  no CUDA graph: it waits"


def test_the_page_has_the_run_or_why_there_is_none() -> None:
    parts = {part.heading: part for part in target_parts({"engine": ENGINE, "run": RUN})}
    assert parts["Run on a GPU"].rows == [
        ("graph", 0.505, pytest.approx(0.9901), 0.25, 2.0, pytest.approx(1980.198), 0.0123),
        ("plain", 1.01, pytest.approx(1.9802), 0.25, 2.0, pytest.approx(990.099), 0.0123),
    ]
    assert [part.rows for part in target_parts({"engine": ENGINE, "run": {"reason": "no GPU"}})][-2:-1] == [
        [("no GPU",)]
    ]
