"""A graph in another type: nothing else about it changes."""

import torch
from torch import Tensor, nn

from normfuse.graph import capture
from normfuse.graph.edit import converted
from normfuse.testing import Small, seeded


def windows(m: nn.Module, x: Tensor) -> Tensor:
    """Partition (B, 8, 8, 3) into windows of 4, shifted, and put them together again."""
    batch, height, width, channels = x.shape
    parts = torch.roll(x, (-1, -1), (1, 2)).view(batch, height // 4, 4, width // 4, 4, channels)
    rows: Tensor = m.f(parts.transpose(2, 3).reshape(-1, 16, channels))  # type: ignore[operator]
    whole = rows.view(-1, height // 4, width // 4, 4, 4, channels).transpose(2, 3)
    return whole.reshape(batch, height, width, channels)


def test_the_batch_stays_open() -> None:
    model = Small(windows, f=nn.Linear(3, 3)).eval()
    graph = capture(model, [torch.randn(2, 8, 8, 3, generator=seeded(0))])
    wide = converted(graph, torch.float64)
    assert wide.input_specs[0].shape == (None, 8, 8, 3)
    assert graph.input_specs[0].shape == (None, 8, 8, 3)
    for batch in (1, 5):
        x = torch.randn(batch, 8, 8, 3, generator=seeded(1), dtype=torch.float64)
        assert torch.allclose(wide.run(x)[0], graph.run(x.float())[0].double(), atol=1e-5)


def test_every_float_follows_and_nothing_else() -> None:
    model = Small(lambda m, x: (m.f(x).half() * 2, x.argmax(-1)), f=nn.Linear(3, 2)).eval()
    wide = converted(capture(model, [torch.randn(2, 3, generator=seeded(0))]), torch.float64)
    assert [spec.dtype for spec in wide.output_specs] == [torch.float64, torch.int64]
    assert [t.dtype for t in wide.run(torch.ones(4, 3, dtype=torch.float64))] == [torch.float64, torch.int64]
