"""Overrides: which layers they mean, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import UsageError
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.overrides import Overrides

LAYERS = ("patch_embed", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "head")


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        ("head", Bits(8, 8)),
        ("blocks.0.mlp.fc2", Bits(4, 8)),
        ("blocks.0.mlp.fc1", None),
        ("patch_embed", Bits(FLOAT, FLOAT)),
        ("Head", None),
        ("head.fc", None),
    ],
)
def test_a_pattern_means_layers(layer: str, bits: Bits | None) -> None:
    assert Overrides.parse("head=8, blocks.*.fc2=w4a8 patch_embed=32").bits_for(layer) == bits


def test_the_last_pattern_that_fits_counts() -> None:
    found = Overrides.parse("*=w4a8 blocks.0.*=6 *.fc?=w3a16")
    assert found.bits_for("head") == Bits(4, 8)
    assert found.bits_for("blocks.0.attn.qkv") == Bits(6, 8)
    assert found.bits_for("blocks.0.mlp.fc1") == Bits(3, FLOAT)


def test_no_words_override_nothing() -> None:
    assert Overrides.parse(" , ") == Overrides() == Overrides.parse("")
    assert Overrides().bits_for("head") is None
    assert str(Overrides()) == ""


WIDTHS = st.integers(2, 8)
BITS = st.builds(Bits, WIDTHS, WIDTHS | st.just(FLOAT)) | st.just(Bits(FLOAT, FLOAT))


@given(st.lists(st.tuples(st.text("abc.*?[]=_0", min_size=1), BITS)).map(tuple))
def test_overrides_survive_their_text(patterns: tuple[tuple[str, Bits], ...]) -> None:
    overrides = Overrides(patterns)
    assert Overrides.parse(str(overrides)) == overrides


@pytest.mark.parametrize("text", ["head", "=8", "head=", "head=9", "head=w4", "head=int8", "a=8 b", "8"])
def test_what_has_no_pattern_or_bits_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="overrides cannot have") as caught:
        Overrides.parse(text)
    assert caught.value.where == "recipe"
    assert caught.value.expected


@pytest.mark.parametrize("pattern", ["", "a b", "a,b", " a"])
def test_a_pattern_has_nothing_that_divides_words(pattern: str) -> None:
    with pytest.raises(UsageError, match="overrides cannot have"):
        Overrides(((pattern, Bits(8, 8)),))


def test_patterns_that_mean_nothing_are_found() -> None:
    found = Overrides.parse("head=8 hed=8 *=4 blocks.*.fc3=4")
    assert found.unused(LAYERS) == ["hed", "blocks.*.fc3"]
    assert found.unused([]) == ["head", "hed", "*", "blocks.*.fc3"]
    Overrides.parse("head=8 *.fc2=4").refuse_unused(LAYERS)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("hed=8", "did you mean head?"),
        ("blocks.1.mlp.fc3=4", "did you mean blocks.1.mlp.fc2?"),
        ("fc2=4", "did you mean *.fc2?"),
        ("blocks.0=4", "did you mean blocks.0.*?"),
        ("mlp=4", "did you mean *mlp*?"),
        ("zzz=4", ""),
    ],
)
def test_an_unused_pattern_is_refused(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match="no layer that can have bits is called so") as caught:
        Overrides.parse(f"head=8 {text}").refuse_unused(LAYERS)
    assert caught.value.hint == hint
    assert (
        caught.value.expected == "names such as blocks.0.attn.qkv, blocks.0.mlp.fc1, blocks.0.mlp.fc2, blocks.1.mlp.fc2"
    )


def test_without_layers_every_pattern_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        Overrides.parse("head=8").refuse_unused([])
    assert caught.value.expected == "no overrides: no layer has bits"
