"""Tables of four bits from the recipe to the saved engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.recipe import Recipe
from normfuse.testing import randomized


class Words(nn.Module):
    """Word vectors and positions, an MLP behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(499, 64), nn.Parameter(torch.randn(1, 17, 64))
        self.up, self.head = nn.Linear(64, 48), nn.Linear(48, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions
        return self.head(torch.nn.functional.gelu(self.up(x)).mean(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8", "w4a8", "w4a16"])
def test_tables_of_four_bits_make_the_file_smaller_and_run(bits: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = randomized(Words()).eval()
    ids = np.random.default_rng(0).integers(0, 499, (32, 17))
    sizes, errors = dict[int, int](), dict[int, float]()
    for table_bits in (8, 4):
        recipe = Recipe(bits=bits, table_bits=table_bits, benchmark=False, threads=1, max_drop=100)
        built = normfuse.compile(model, [torch.from_numpy(ids[:2])], calibration=ids, recipe=recipe)
        assert all(check["holds"] for check in built.report["checks"]), built.report["checks"]
        assert built.report["verdict"]["ships"] != "float"
        built.save(folder := tmp_path / str(table_bits))
        found = normfuse.load(folder)(ids=ids)["output"]
        wanted = model(torch.from_numpy(ids)).detach().numpy()
        sizes[table_bits] = (folder / "model.onnx").stat().st_size
        errors[table_bits] = float(np.square(found - wanted).sum() / np.square(wanted - wanted.mean(0)).sum())
        kinds = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
        assert ("GatherBlockQuantized" in kinds) is (table_bits == 4)
    elements = 499 * 64 + 17 * 64
    assert sizes[8] - sizes[4] == pytest.approx(elements * (1 - 5 / 8), rel=0.1), "half a byte and an eighth of a scale"
    assert max(errors.values()) < 0.05
