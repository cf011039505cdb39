from __future__ import annotations

import pytest
import torch
from correlated_layer import Layer, correlated_layer
from rounded_layer import by_gptq

from normfuse.quant import INT4, shrink_drift, weight_params


@pytest.mark.parametrize(("rows", "drift"), [(40, 0.0), (30, 0.3), (60, 1.0), (700, 1.0)])
def test_the_shrinkage_follows_from_the_inputs(rows: int, drift: float) -> None:
    layer = correlated_layer(4, rows=rows, inputs=20, drift=drift)
    x, error = layer.x.double(), layer.x_float.double() - layer.x.double()
    added = 0.05 * x.square().sum(dim=0).mean() * torch.eye(20)
    smoother = x @ torch.linalg.inv(x.mT @ x + added) @ x.mT
    rest = torch.eye(rows) - smoother
    noise = (rest @ error).square().sum() / (rest @ rest).trace()
    share = ((error.mT @ smoother @ error).trace() - noise * smoother.trace()) / (smoother @ error).square().sum()
    found = shrink_drift(layer.moments, damping=0.05)
    assert found.drift is not None
    assert layer.moments.drift is not None
    expected = layer.moments.drift * (share.clamp(0, 1) if drift else 0.0)
    torch.testing.assert_close(found.drift, expected, atol=1e-6 * float(expected.abs().max() + 1e-30), rtol=0)


@pytest.mark.parametrize(("rows", "gain", "gain_over_all"), [(80, -0.01, 0.1), (200, 0.0, 0.0), (2000, 0.03, -0.01)])
def test_shrunk_corrections_hold_on_samples_not_seen(rows: int, gain: float, gain_over_all: float) -> None:
    """From few samples they do no harm beside none, where all would; from many they are all."""
    errors = torch.zeros(3, dtype=torch.float64)
    for seed in range(10):
        layer = correlated_layer(seed, inputs=64, rows=rows + 1000, drift=1.0, out=16)
        seen = Layer(layer.x[:rows], layer.x_float[:rows], layer.weight).moments
        unseen = Layer(layer.x[rows:], layer.x_float[rows:], layer.weight)
        params = weight_params(layer.weight, 0, INT4)
        found = [
            by_gptq(layer.weight, params, shrink_drift(seen)),
            by_gptq(layer.weight, params, seen, asymmetric_correction=False),
            by_gptq(layer.weight, params, seen),
        ]
        each = torch.stack([unseen.squared_error(codes, params).sum() for codes in found])
        errors += each / each[0]
    shrunk, without, whole = errors.tolist()
    assert shrunk < (1 - gain) * without
    assert shrunk < (1 - gain_over_all) * whole
