"""What an operator computes for one element of a batch is what it computes for it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import torch
from integer_calls import ENDS, WINDOWS, Arguments, any_codes, any_numbers
from onnx_calls import torch_result
from torch import Tensor


def batched_calls(size: int) -> dict[str, tuple[Arguments, tuple[str, ...]]]:
    """Return a call of every operator on a batch, and which of its arguments have the batch in front."""
    row, image, tokens = any_codes(size, 5, 8), any_codes(size, 4, 6, 5), any_codes(size, 5, 8, dtype=torch.int16)
    vectors = {"bias": any_numbers(8), "multiplier": any_numbers(8, limit=2**24), "shift": 30}
    linear = {"x": row, "weight": any_codes(8, 8, seed=2), **vectors}
    by_token = {"factors": any_numbers(size, 5, 1, limit=2**20).abs(), "token_shift": 17}
    window = {"x": image, "weight": any_codes(8, 2, 3, 2, seed=2), **vectors, **WINDOWS["dilated"], "x_zero_point": 3}
    side = {"residual": any_codes(size, 8, 6, 4, seed=3), "residual_multiplier": 2**28}
    one = {"multiplier": 2**20, "shift": 30}
    norm = {"x": tokens, **vectors, "epsilon": 64}
    heads = {
        "q": row,
        "k": any_codes(size, 8, 7, seed=4),
        "v": any_codes(size, 7, 3, seed=5),
        "bias": any_numbers(5, 7),
    }
    scores = {"score_multiplier": 2**20, "score_shift": 24, "multiplier": 2**30, "shift": 50}
    line = {"x": tokens, "low": torch.tensor([0, 0, 4]), "high": torch.tensor([0, 1, 3]), "axis": 1}
    line["weight"] = torch.tensor([[0], [2**13 + 1], [77]], dtype=torch.int32)
    pair = {"x": row, "y": any_codes(size, 5, 8, seed=6)}
    return {
        "requantize": ({"x": tokens, **vectors}, ("x",)),
        "int_add": (pair | {"x_multiplier": 2**28, "y_multiplier": -(2**29), "offset": 5, "shift": 30}, ("x", "y")),
        "int_multiply": (pair | {"x_zero_point": 3, "y_zero_point": -4, **one}, ("x", "y")),
        "int_mean": (
            {"x": tokens, "axes": [1], "keeps_axes": False, "offset": 3, "multiplier": 2**26, "shift": 30},
            ("x",),
        ),
        "int_table": ({"x": row, "table": any_codes(256)}, ("x",)),
        "int_linear": (linear, ("x",)),
        "int_linear_add": (linear | {"residual": tokens, "residual_multiplier": 2**22}, ("x", "residual")),
        "int_linear_table": (linear | {"table": any_codes(256)}, ("x",)),
        "int_token_codes": ({"x": tokens, "is_centred": True}, ("x",)),
        "int_token_factors": ({"x": tokens, "epsilon": 64, "is_centred": True}, ("x",)),
        "int_linear_tokens": (linear | by_token, ("x", "factors")),
        "int_linear_tokens_table": (linear | by_token | {"table": any_codes(256)}, ("x", "factors")),
        "int_conv2d": (window, ("x",)),
        "int_conv2d_add": (window | side, ("x", "residual")),
        "int_matmul": ({"x": row, "y": heads["k"], **one}, ("x", "y")),
        "int_attention": (heads | scores, ("q", "k", "v")),
        "int_layer_norm": (norm, ("x",)),
        "int_rms_norm": (norm, ("x",)),
        "shiftmax": ({"scores": row, "x0": -23, "n": 15}, ("scores",)),
        "shift_gelu": ({"x": row, "x0": -23, "n": 23, "multiplier": 2**26, "shift": 30}, ("x",)),
        "lambda_shift_gelu": ({"x": row, "x0": -1504, "bound": 99, **one}, ("x",)),
        "int_interpolate": (line, ("x",)),
    }


FEWER_ENDS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("int_table", "int_token_codes", "int_token_factors", "int_interpolate"), ()),
    **dict.fromkeys(("int_linear_table", "int_linear_tokens_table"), ("zero_point",)),
    "shiftmax": ("maximum",),
}
BATCHED: Final = sorted(batched_calls(1))


@pytest.mark.parametrize("name", BATCHED)
def test_batch_means_nothing(name: str) -> None:
    arguments, batched = batched_calls(5)[name]
    ends = {key: value for key, value in ENDS["int16"].items() if key in FEWER_ENDS.get(name, ENDS["int16"])}

    def result(pick: Callable[[Tensor], Tensor]) -> Tensor:
        return torch_result(name, arguments | {key: pick(arguments[key]) for key in batched} | ends)

    together = result(lambda x: x)
    assert len(together.unique()) > 3
    for index in range(5):
        assert torch.equal(result(lambda x, index=index: x[index : index + 1]), together[index : index + 1])
    assert torch.equal(result(lambda x: x.flip(0)), together.flip(0))
    extreme = result(
        lambda x: torch.cat([torch.full_like(x[:1], torch.iinfo(x.dtype).min), x, torch.zeros_like(x[:2])])
    )
    assert torch.equal(extreme[1:-2], together)
