"""The GPU baselines, run as a whole on the CPU at tiny shapes: entries, reasons, figures' definitions, the JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_variants
from benchmarks.gpu import Job, measure
from benchmarks.gpu_variants import VARIANTS, prepare
from benchmarks.vision import SHAPES, Network, build, colour_images
from normfuse.bench import gpu_device
from normfuse.bench.gpu_timing import GpuSchedule, Turn, summary, take_turn

CPU = torch.device("cpu")
QUICK = GpuSchedule(rounds=3, warm_up_ms=1.0, seconds=0.0, least=3, alone=2)
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEAD = {"batch", "variant", "norm", "status", "reason"}
RUNS = {"compiled", "cuda_graph", "compile_s", "quantized", "left"}
FIGURES = {"n", "throughput_qps", "gpu_ms", "latency_ms", "enqueue_ms", "host_ms", "round_medians_ms", "spread"}
STATISTICS = {"min", "max", "mean", "median", "p90", "p95", "p99"}
ACCURACY = {"cosine", "max_error", "top_1_agreement"}


@cache
def tiny(norm: str) -> Network:
    return build("tiny", norm)


def job(**changes: Any) -> Job:
    whole = Job(device=CPU, model="tiny", batches=[2], norms=["LN", "UN"], compiles=False, schedule=QUICK)
    return replace(whole, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def test_the_json_is_what_the_docstring_says(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    options = ("--model", "tiny", "--batch", "1", "3", "--no-compile", "--seconds", "0.001", "--warm-up", "1")
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", device, *options, "-o", str(path)])
    gpu.main()
    found = json.loads(path.read_text())

    assert (found["format"], found["schema"]) == ("normfuse gpu baselines", 1)
    assert found.keys() == {"format", "schema", "environment", "model", "method", "entries", "states"}
    assert found["environment"]["device"]["type"] == device
    assert found["model"]["parameters"].keys() == {"LN", "UN", "PRepBN"}
    assert found["method"]["clock"] == ("host" if device == "cpu" else "cuda events")
    assert found["method"]["cuda_graphs"] == (device != "cpu")
    assert found["method"]["compile_mode"] is None
    keys = [(each["batch"], each["variant"], each["norm"]) for each in found["entries"]]
    wanted = [(b, v.name, n) for b in (1, 3) for v in VARIANTS for n in ("LN", "UN", "PRepBN")]
    assert keys == wanted
    measured = [each for each in found["entries"] if each["status"] == "measured"]
    assert len(measured) == len(wanted) or device != "cpu"
    for each in measured:
        assert each.keys() == HEAD | RUNS | FIGURES | {"accuracy", "against_ln"}
        assert each["reason"] == ""
        assert each["gpu_ms"].keys() == each["enqueue_ms"].keys() == each["host_ms"].keys() == STATISTICS
        assert each["latency_ms"] == each["gpu_ms"]
        assert each["accuracy"].keys() == ACCURACY
        assert len(each["round_medians_ms"]) == 3
        assert each["n"] >= 30
        assert not each["compiled"]
        assert each["norm"] != "LN" or each["against_ln"] == 1.0
        assert each["gpu_ms"]["min"] <= each["gpu_ms"]["median"] <= each["gpu_ms"]["p99"] <= each["gpu_ms"]["max"]
        assert len(each["quantized"]) == (8 if "W8A8" in each["variant"] else 0)
    documented = gpu.__doc__ or ""
    places = (found, found["environment"]["device"], found["model"], found["method"], measured[0], *found["states"])
    names = {name for place in places for name in place} | ACCURACY | STATISTICS
    assert [name for name in names if name not in documented] == []
    assert "tiny on" in capsys.readouterr().out


@pytest.mark.slow
def test_accuracy_is_against_the_unfolded_network_in_fp32() -> None:
    found = measure(job(norms=["LN", "UN", "PRepBN"], schedule=replace(QUICK, rounds=1)))
    by_name = {(each["variant"], each["norm"]): each["accuracy"] for each in found["entries"]}
    for norm in ("LN", "UN", "PRepBN"):
        exact = by_name["eager fp32", norm]
        assert exact["max_error"] < 1e-5  # some hundred sums of float32, in another order
        assert exact["top_1_agreement"] > 99
        assert exact["max_error"] < by_name["eager fp16", norm]["max_error"] < 0.01
        assert by_name["eager fp16", norm]["max_error"] < by_name["eager bf16", norm]["max_error"] < 0.05
        for codes in ("fp8", "int8"):
            assert 0.99 < by_name[f"compiled {codes} W8A8", norm]["cosine"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["LN", "UN", "PRepBN"])
def test_norms_that_fold_are_gone_and_the_network_is_the_same(norm: str) -> None:
    network = tiny(norm)
    images = colour_images(3, SHAPES["tiny"].size, seed=5)
    found, wanted = network.measured(images), network.reference(images)

    calls = [str(node.target) for node in network.measured.graph.nodes if node.op == "call_function"]
    assert sum("layer_norm" in call for call in calls) == (5 if norm == "LN" else 0)
    assert not [call for call in calls if any(word in call for word in ("batch_norm", "aten.mul", "aten.div", "sqrt"))]
    # Ten maps in a row with sums of at most 192 numbers, in another order and with folded weights.
    bound = 10 * 192 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, atol=bound, rtol=0)


@pytest.mark.slow
def test_a_variant_that_fails_says_why_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(variant: Any, network: Any, *given: Any, **options: Any) -> Any:
        if (variant.name, network.norm) == ("eager fp16", "LN"):
            raise torch.OutOfMemoryError("no room for it")
        engine = prepare(variant, network, *given, **options)
        if (variant.name, network.norm) != ("eager bf16", "UN"):
            return engine
        calls = iter(range(130))  # enough to be judged, not to be timed

        def run() -> torch.Tensor:
            next(calls)
            return engine.run()

        return replace(engine, run=run)

    monkeypatch.setattr(gpu, "prepare", fail)
    variants = [each for each in VARIANTS if each.name.startswith("eager")]
    found = measure(job(variants=variants, schedule=replace(QUICK, least=50)))
    by_name = {(each["variant"], each["norm"]): each for each in found["entries"]}

    assert len(by_name) == 6
    failed = by_name["eager fp16", "LN"]
    assert (failed["status"], failed["reason"]) == ("failed", "OutOfMemoryError: no room for it")
    assert failed.keys() == HEAD
    assert by_name["eager fp16", "UN"]["against_ln"] is None
    assert by_name["eager bf16", "UN"]["reason"].startswith("StopIteration")
    assert [each["status"] for each in found["entries"]].count("measured") == 4


def test_float8_is_skipped_where_a_gpu_has_no_products_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_variants, "capability", lambda device: (8, 6))
    found = measure(job(norms=["UN"], variants=VARIANTS[-2:], schedule=replace(QUICK, rounds=1)))
    float8, int8 = found["entries"]
    assert (float8["status"], int8["status"]) == ("skipped", "measured")
    assert float8["reason"] == "products of float8 need compute capability 8.9, this GPU has 8.6"
    assert "skipped: compiled fp8 W8A8, UN: products of float8" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS[-2:], ids=lambda variant: variant.name)
def test_networks_with_codes_are_compiled_whole(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, whole = list[dict[str, Any]](), torch.compile

    def compile_quickly(function: Any, **options: Any) -> Any:
        asked.append(options)
        return whole(function, backend="eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", compile_quickly)
    network, images = tiny("UN"), colour_images(2, SHAPES["tiny"].size, seed=1)
    with torch.no_grad():
        made, plain = (prepare(variant, network, images, CPU, compiles=each) for each in (True, False))
        torch.testing.assert_close(made.run(), plain.run(), atol=0, rtol=0)
    assert asked == [{"mode": "max-autotune-no-cudagraphs", "fullgraph": True, "dynamic": False}]
    assert made.is_compiled
    assert made.compile_s is not None
    assert made.compile_s > 0
    assert not plain.is_compiled
    assert not made.is_graph
    torch.compiler.reset()


def test_every_image_is_predicted_and_the_timed_input_stays() -> None:
    network, images = tiny("LN"), colour_images(7, SHAPES["tiny"].size, seed=1)
    with torch.no_grad():
        engine = prepare(VARIANTS[0], network, images[:3], CPU, compiles=False)
        logits = engine.predict(images)
        wanted = network.reference(images).double()
    bound = 10 * 192 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    torch.testing.assert_close(logits, wanted, atol=bound, rtol=0)
    torch.testing.assert_close(engine.image, images[:3], atol=0, rtol=0)


def test_figures_are_those_of_trtexec_and_medians_are_of_rounds() -> None:
    turns = [
        Turn(compute=[1.0, 2.0, 9.0], enqueue=[0.5] * 3, alone=[3.0], wall=6.0),
        Turn(compute=[4.0, 4.0, 5.0, 5.0], enqueue=[0.1] * 4, alone=[7.0], wall=16.0),
        Turn(compute=[3.0], enqueue=[0.3], alone=[5.0], wall=4.0),
    ]
    found = summary(turns)
    assert found["round_medians_ms"] == [2.0, 4.5, 3.0]
    assert found["gpu_ms"] == {
        **{"min": 1.0, "max": 9.0, "mean": 4.125, "median": 3.0},
        **{"p90": pytest.approx(6.2), "p95": pytest.approx(7.6), "p99": pytest.approx(8.72)},
    }
    assert (found["n"], found["throughput_qps"]) == (8, 250.0)  # 500, 250 and 250 a second
    assert found["spread"] == pytest.approx(2.5 / 3)


def test_a_turn_is_warmed_up_and_long_enough() -> None:
    runs = list[int]()
    plan = GpuSchedule(warm_up_ms=5.0, seconds=0.01, least=4, alone=3)
    turn = take_turn(lambda: runs.append(1), CPU, plan)
    assert turn.wall >= 10
    assert len(runs) > len(turn.compute) + 3  # the warm-up is not among the figures
    assert len(turn.alone) == 3
    assert len(take_turn(lambda: None, CPU, replace(plan, seconds=0.0, warm_up_ms=0.0)).compute) == 4


def test_without_cuda_it_ends_with_five(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--batch", "1"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 5
    told = capsys.readouterr().err
    assert "a CUDA device that PyTorch can use is not installed" in told
    assert "--device cpu" in told


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("1980, 2619, 41, 210.55, [N/A]\n", [1980.0, 2619.0, 41.0, 210.55, None]),
        ("No devices were found\n", None),
        (None, None),
    ],
    ids=["told", "no-device", "no-program"],
)
def test_the_state_is_what_nvidia_smi_tells(
    answer: str | None, wanted: list[float | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: tuple[str, ...], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        assert command[-1] == "--id=GPU-1234"
        if answer is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(subprocess, "run", run)
    state = gpu_device.device_state(torch.device("cuda"))
    assert (None if state is None else list(state.values())) == wanted
