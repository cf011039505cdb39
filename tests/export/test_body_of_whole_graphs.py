"""What a file computes in another type is what it computed, up to the roundings: random graphs, and exported ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from float_files import outcome, sample, written
from torch import Tensor, nn
from typed_files import BODIES, TINIEST, UNIT, typed

from normfuse.checks import check_typed, require
from normfuse.export.largest_values import largest_values
from normfuse.export.onnx import export_onnx
from normfuse.export.placement import tensorrt_placement
from normfuse.export.product_types import product_types
from normfuse.export.widened import write_widened
from normfuse.graph import capture
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.spell_out_attention import SpellOutAttention
from normfuse.precision import round_all_to_nearest
from normfuse.quant.bits import Bits
from normfuse.quant.target import BodyType, EightBits
from normfuse.runtime.onnx_session import AS_WRITTEN
from normfuse.testing import Small, observed_ranges, randomized, seeded


class Drawn:
    """A random graph as text, with what it computes in float64 and how far rounding every result may lead."""

    def __init__(self, seed: int, unit: float) -> None:
        self._random, self._unit, self.text = np.random.default_rng(seed), unit, ""
        self.constants = dict[str, Any]()
        self.inputs = {"x": sample(4, 6, seed=seed), "u": sample(4, 6, seed=seed + 1)}
        # By name: values and their errors, so far.
        self.tensors = {name: (each.astype(np.float64), self._rounding(each)) for name, each in self.inputs.items()}
        for step in range(9):
            self._grow(f"t{step}")
        made = [f"t{step}" for step in range(9)]
        self.outputs = [name for name in made if f"{name}," not in self.text and f"{name})" not in self.text]
        self.outputs += [name for name in self._random.choice(made, 2, replace=False) if name not in self.outputs]
        sizes = {name: ",".join(map(str, self.tensors[name][0].shape)) for name in self.outputs}
        ports = ", ".join(f"float[{sizes[name]}] {name}" for name in self.outputs)
        self.text = f"g (float[4,6] x, float[4,6] u) => ({ports}) {{ {self.text} }}"

    def _rounding(self, values: Any) -> Any:
        """Return what two roundings change: one to compute in the type, and one of a result computed in another."""
        return 2 * self._unit * np.abs(values) + 2 * TINIEST

    def _add(self, name: str, call: str, values: Any, error: Any) -> None:
        self.text += f"{name} = {call}\n"
        self.tensors[name] = (values, error + self._rounding(np.abs(values) + error))

    def _grow(self, name: str) -> None:
        a = str(self._random.choice(list(self.tensors)))
        x, e = self.tensors[a]
        match self._random.integers(8):
            case 0:
                b = str(self._random.choice(list(self.tensors)))
                y, f = self.tensors[b]
                if y.shape == x.shape:
                    self._add(name, f"Add ({a}, {b})", x + y, e + f)
                else:
                    self._add(name, f"Tanh ({a})", np.tanh(x), e)
            case 1:
                s = self.constants[f"{name}s"] = sample(x.shape[1], seed=int(self._random.integers(99)))
                error = e * np.abs(s) + (np.abs(x) + e) * self._rounding(s)
                self._add(name, f"Mul ({a}, {name}s)", x * s, error)
            case 2:
                inner = x.shape[1]
                w = self.constants[f"{name}w"] = sample(inner, 6, seed=int(self._random.integers(99))) / 3
                magnitude = (np.abs(x) + e) @ (np.abs(w) * (inner + 2) * self._unit + TINIEST)
                self._add(name, f"MatMul ({a}, {name}w)", x @ w.astype(np.float64), e @ np.abs(w) + magnitude)
            case 3:
                self._add(name, f"Relu ({a})", np.maximum(x, 0), e)
            case 4:
                self._add(name, f"Transpose ({a})", x.T, e.T)
            case 5:
                powers = np.exp(x - x.max(1, keepdims=True))
                values = powers / powers.sum(1, keepdims=True)
                self._add(name, f"Softmax ({a})", values, values * np.expm1(2 * e.max(1, keepdims=True)))
            case 6:
                axis = self.constants[f"{name}axis"] = np.array([1])
                mean = np.broadcast_to(x.mean(axis[0], keepdims=True), x.shape)
                error = np.broadcast_to(e.mean(1, keepdims=True), x.shape)
                self.constants[f"{name}size"] = np.array(x.shape)
                self.text += f"{name}m = ReduceMean <keepdims=1> ({a}, {name}axis)\n"
                self._add(name, f"Expand ({name}m, {name}size)", mean, error)
            case _:
                self._add(name, f"Sigmoid ({a})", 1 / (1 + np.exp(-x)), e / 4 + 2 * self._unit)


@BODIES
@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_are_off_by_their_roundings(seed: int, body: BodyType, tmp_path: Path) -> None:
    drawn = Drawn(seed, UNIT[body])
    source = written(tmp_path / "m.onnx", drawn.text, **drawn.constants)
    largest = largest_values(source, [drawn.inputs])
    assert {largest[name] for name in ("x", "u")} == {float(np.abs(each).max()) for each in drawn.inputs.values()}
    _, path = typed(source, body, largest)
    write_widened(path, path := path.with_name("widened.onnx"), rounds=True)
    found = outcome(path, **drawn.inputs)
    for name in drawn.outputs:
        values, error = drawn.tensors[name]
        assert (np.abs(found[name] - values) <= error).all(), name
        assert (error <= 0.5 * max(1.0, np.abs(values).max())).all(), "a bound that says nothing"


def block(m: Any, x: Tensor) -> Tensor:
    """A convolution with a skip, then a block of a transformer."""
    x = (m.conv(x) + x).relu().flatten(2).mT
    y = m.norm(x)
    q, k, v = (each.unflatten(-1, (3, 16)).transpose(1, 2) for each in (m.q(y), m.k(y), m.v(y)))
    x = x + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    made: Tensor = x + m.down(F.gelu(m.up(m.norm(x))))
    return made


def network() -> nn.Module:
    parts: dict[str, nn.Module] = {name: nn.Linear(48, 48) for name in ("q", "k", "v", "out")}
    parts |= {"conv": nn.Conv2d(48, 48, 3, padding=1), "norm": nn.LayerNorm(48)}
    parts |= {"up": nn.Linear(48, 96), "down": nn.Linear(96, 48)}
    return randomized(Small(block, **parts))


KINDS_OF_CODES = [
    pytest.param("8", EightBits.INT8, {"int8"}, id="int8"),
    pytest.param("8", EightBits.FP8, {"fp8"}, id="fp8"),
    pytest.param("w4a16", EightBits.INT8, {"int4 in blocks of 16 x BODY", "int4 in blocks of 32 x BODY"}, id="int4"),
]


@pytest.mark.slow
@BODIES
@pytest.mark.parametrize(("bits", "eight", "types"), KINDS_OF_CODES)
def test_exported_networks_are_their_simulation(
    bits: str, eight: EightBits, types: set[str], body: BodyType, tmp_path: Path
) -> None:
    x = torch.randn(3, 48, 4, 3, generator=seeded(1))
    graph = capture(network(), (x,))
    SpellOutAttention().run(graph)
    Canonicalize().run(graph)
    PlaceQuantizers(placement=tensorrt_placement(Bits.parse(bits), eight)).run(graph)
    decided = round_all_to_nearest(graph, observed_ranges(graph, x))
    InsertQuantizers(activations=decided.activations, weights=decided.weights, biases_stay_float=True).run(graph)
    export_onnx(graph, source := tmp_path / "m.onnx", standard=True)
    (name,) = graph.input_names
    found, path = typed(source, body, largest_values(source, [{name: x.numpy()}]))
    assert not found.wide
    assert set(found.usual) == {"LayerNormalization", "Softmax"}
    linear = {each.spelled for each in product_types(path) if each.has_weight and each.operator != "Conv"}
    assert linear == {each.replace("BODY", body.value) for each in types}
    assert all(node.name for node in onnx.load(path).graph.node)
    write_widened(path, path := tmp_path / "widened.onnx", rounds=True)
    require(check_typed(graph, path, [(x,)], body, threads=1, session_config=AS_WRITTEN))
