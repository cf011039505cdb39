"""The text form: complete, stable, free of addresses."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from normfuse.graph import capture
from normfuse.graph.text import render_node
from normfuse.testing import Golden, Small, randomized, seeded


class Everything(nn.Module):
    """Inputs of two types, a dynamic axis beside others, keyword and list arguments, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 5), nn.LayerNorm(5)
        self.register_buffer("offset", torch.arange(3.0))

    def forward(self, words: Tensor, x: Tensor) -> dict[str, Tensor]:
        tokens = self.norm(self.words(words)) + torch.full((1,), 1.0 / 3.0, dtype=torch.float64).float()
        parts = torch.add(x, 1, alpha=2).chunk(2, dim=1)
        return {"tokens": tokens.flatten(0, 1), "parts": torch.cat([*parts, x.double().to(x.dtype)], 1)}


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 7, (2, 3), generator=seeded(0)), torch.randn(2, 4, generator=seeded(1))


def test_the_text_form(golden: Golden) -> None:
    assert capture(randomized(Everything()), inputs()).text() == golden


def test_two_captures_have_one_text() -> None:
    texts = {capture(randomized(Everything(), seed=seed), inputs()).text() for seed in range(2)}
    # A capture in between takes symbols of the tracer; they must not show.
    capture(nn.Linear(3, 2), (torch.randn(5, 3, generator=seeded(2)),))
    texts.add(capture(Everything(), inputs()).text())
    assert len(texts) == 1


def test_no_address_and_no_path_is_in_the_text() -> None:
    text = capture(randomized(Everything()), inputs()).text()
    assert not re.search(r"0x[0-9a-f]{4,}|FakeTensor|<|\.py", text)
    assert str(Path.home()) not in text


def test_symbols_are_numbered_by_appearance() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y])

    graph = capture(Two(), (torch.randn(2, 5, generator=seeded(0)), torch.randn(3, 5, generator=seeded(1))))
    assert [line.rpartition(": ")[2] for line in graph.text().splitlines()[:2]] == ["f32[s0, 5]", "f32[s1, 5]"]


def test_a_single_line() -> None:
    graph = capture(Small(lambda m, x: x * 2), torch.ones(3, 5))
    (line,) = [render_node(node) for node in graph.nodes if node.op == "call_function"]
    assert line == "%mul = aten.mul(%x, 2) : f32[s0, 5]"
