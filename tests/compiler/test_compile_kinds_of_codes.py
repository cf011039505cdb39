"""Dynamic activations and asymmetric weights from the recipe to the saved engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.nn import UnifiedNorm
from normfuse.page import render_page
from normfuse.recipe import Recipe
from normfuse.testing import randomized


class Mixer(nn.Module):
    """A patch embedding, attention written by the user, an MLP and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 16, 3, 3)
        self.norm, self.qkv, self.out = UnifiedNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) * 0.25, dim=-1) @ v)
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return self.head(x.mean(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "products", "kind"),
    [
        ({"bits": "w4a8", "activations": "dynamic"}, 7, "dynamic activations"),
        ({"bits": "8", "activations": "dynamic", "weights": "asymmetric", "effort": 0}, 7, "asymmetric weights"),
        ({"bits": "w4a16", "weights": "asymmetric"}, 7, "asymmetric weights"),
        ({"bits": "8", "weights": "asymmetric"}, 0, "asymmetric weights"),
    ],
    ids=["dynamic", "dynamic and asymmetric", "weights alone", "integer kernels"],
)
def test_what_is_saved_runs_as_the_simulation_said(
    options: dict[str, str], products: int, kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = randomized(Mixer()).eval()
    data = np.random.default_rng(0).standard_normal((32, 2, 9, 6)).astype(np.float32)
    recipe = Recipe(benchmark=False, threads=1, max_drop=100).with_options(**options)
    built = normfuse.compile(model, [torch.randn(2, 2, 9, 6)], calibration=data, recipe=recipe)
    assert all(check["holds"] for check in built.report["checks"]), built.report["checks"]
    assert built.report["verdict"]["ships"] != "float"
    built.save(tmp_path / "artifact")
    nodes = onnx.load(tmp_path / "artifact" / "model.onnx").graph.node
    assert len([node for node in nodes if node.op_type == "MatMulNBits"]) == products
    report = json.loads((tmp_path / "artifact" / "report.json").read_text())
    assert report["quantization"]["kinds"][kind] >= 5 or options["bits"] == "8"
    assert report["quantization"]["kinds"][kind] > 0
    assert kind in render_page(report)
    checks = [check["name"] for check in report["checks"]]
    assert ("engine's products = simulation's" in checks) is ("activations" in options)
    found = normfuse.load(tmp_path / "artifact")(image=data[:8])["output"]
    wanted = model(torch.from_numpy(data[:8])).detach().numpy()
    noise = np.square(found - wanted).sum() / np.square(wanted).sum()
    assert noise < (0.01 if options["bits"] == "8" else 0.1)
