"""Products of constants and of rows of tables: learned queries, a matrix in front, embeddings that a map reads."""

from __future__ import annotations

from typing import Any

import torch
from integer_module import hold, hold_all, lower, module
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.testing import seeded

WIDTH, TOKENS, WORDS = 8, 5, 11
HEADS = (2, 4)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, HEADS).transpose(1, 2)


def test_a_learned_query() -> None:
    """A pooling head: its one query is no number of a sample."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q = heads(m.q(m.probe).expand(x.shape[0], -1, -1))
        return m.out(F.scaled_dot_product_attention(q, heads(m.k(x)), heads(m.v(x))).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    maps = {name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v")}
    network = module(forward, **maps, out=nn.Linear(WIDTH, 3), probe=torch.zeros(1, 1, WIDTH))
    lowered = hold_all(network, (TOKENS, WIDTH))
    assert "int_attention" in lowered.operators


def test_a_learned_query_of_torchs_attention() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.attention(m.probe.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]

    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    hold_all(module(forward, attention=attention, probe=torch.zeros(1, 1, WIDTH)), (TOKENS, WIDTH))


def test_a_matrix_in_front() -> None:
    network = module(lambda m, x: m.matrix @ m.map(x), map=nn.Linear(7, 6), matrix=torch.zeros(3, TOKENS))
    assert hold_all(network, (TOKENS, 7)).operators == ["int_linear", "int_matmul"]


def test_a_map_and_a_convolution_of_repeated_constants() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = m.map(m.tokens.expand(x.shape[0], -1, -1))
        return rows.mean((1, 2))[:, None, None, None] + x + m.conv(m.image.repeat(x.shape[0], 1, 1, 1))  # type: ignore[no-any-return]

    parts = {"map": nn.Linear(WIDTH, 3), "conv": nn.Conv2d(4, 4, 1)}
    constants = {"tokens": torch.zeros(1, 2, WIDTH), "image": torch.zeros(1, 4, 3, 3)}
    hold_all(module(forward, **parts, **constants), (4, 3, 3))


def test_a_pool_of_a_repeated_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + F.max_pool2d(m.image.expand(x.shape[0], -1, -1, -1), 2)

    hold_all(module(forward, image=torch.zeros(1, 3, 4, 4)), (3, 2, 2))


def words(count: int = 32) -> Tensor:
    return torch.randint(0, WORDS, (count, TOKENS), generator=seeded(5))


def held(network: nn.Module) -> list[str]:
    lowered = lower(network, words())
    hold(lowered, words())
    return lowered.operators


def test_a_map_of_rows_of_a_table() -> None:
    network = module(lambda m, x: m.map(m.table(x)), table=nn.Embedding(WORDS, 6), map=nn.Linear(6, 4))
    assert held(network) == ["requantize", "requantize", "int_linear"]


def test_a_function_of_rows_of_a_table() -> None:
    network = module(lambda m, x: m.map(F.gelu(m.table(x))), table=nn.Embedding(WORDS, 6), map=nn.Linear(6, 4))
    assert "int_table" in held(network)


def test_a_table_that_is_the_last_map_too() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(m.map(m.table(x)), m.table.weight)

    held(module(forward, table=nn.Embedding(WORDS, 6), map=nn.Linear(6, 6)))


def test_a_function_of_a_repeated_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.map(x) + F.silu(m.learned.expand(x.shape[0], -1, -1))  # type: ignore[no-any-return]

    hold_all(module(forward, map=nn.Linear(7, 6), learned=torch.zeros(1, 4, 6)), (4, 7))
