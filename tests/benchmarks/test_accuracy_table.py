"""Which figures a table of accuracies has, and what each is of."""

from __future__ import annotations

import sys

import pytest

from benchmarks import accuracy
from benchmarks.accuracy import OPERANDS, SETTINGS, Setting
from normfuse.recipe import Recipe


def test_tensorrt_has_signed_codes_about_zero_and_onnxruntime_unsigned_ones() -> None:
    here, there = (accuracy._placement(operands, Recipe(bits=8)) for operands in ("maps", "tensorrt"))
    assert here.activation is not None
    assert there.activation is not None
    assert (here.activation.signed, here.symmetric_activations) == (False, False)
    assert (there.activation.signed, there.symmetric_activations) == (True, True)
    assert not there.attention_operands
    assert accuracy._placement("all", Recipe(bits="w4a4")).attention_operands


def test_a_column_has_only_figures_of_its_own() -> None:
    columns = list(OPERANDS)[:3]
    figures = {s: [c for c in columns if accuracy._differs(s, c, columns)] for s in SETTINGS}
    assert figures[Setting("8", 1, 0.2)] == ["maps", "all", "tensorrt"]
    assert figures[Setting("w4a4", 2, 2.5)] == ["maps", "all"]
    assert figures[Setting("w4a16", 1, 0.4)] == ["maps"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--levers=-foresight"], "of --bits"),
        (["--efforts", "1"], "of --bits"),
        (["--bits", "w4a16", "--weights", "asymmetric"], "symmetric weights"),
    ],
)
def test_what_would_be_ignored_is_refused(
    options: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", *options])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert told in capsys.readouterr().err
