"""Every error says what, where, what was expected and what to do, and has its exit code."""

import pytest

from normfuse import errors
from normfuse.errors import InternalError, MissingDependency, NormfuseError, UnsupportedModel
from normfuse.report import PassReport, Reason, Refusal

EXIT_CODES = {
    "CheckFailed": 1,
    "UsageError": 2,
    "UnsupportedModel": 3,
    "BadInput": 4,
    "MissingDependency": 5,
    "InternalError": 70,
    "NormfuseError": 70,
}


def test_every_error_has_its_exit_code() -> None:
    assert {name: getattr(errors, name).exit_code for name in errors.__all__} == EXIT_CODES


def test_the_text_has_four_parts() -> None:
    error = UnsupportedModel("no such operator", where="blocks.3", expected="a known one", hint="keep it in float")
    assert str(error).splitlines() == [
        "no such operator",
        "  at        blocks.3",
        "  expected  a known one",
        "  try       keep it in float",
    ]
    assert error.args == ("no such operator",)


def test_parts_that_are_not_given_leave_no_line() -> None:
    assert str(NormfuseError("what")) == "what"
    assert str(NormfuseError("what", hint="do")).splitlines() == ["what", "  try       do"]


def test_missing_dependencies_say_how_to_install() -> None:
    error = MissingDependency("tensorrt", needed_for="--target trt", install="pip install 'normfuse[tensorrt]'")
    assert error.package == "tensorrt"
    assert str(error).splitlines()[0] == "tensorrt is not installed"
    assert "pip install" in error.hint
    assert error.where == "--target trt"


def test_our_bugs_ask_to_be_reported() -> None:
    assert "report it" in InternalError("what").hint


@pytest.mark.parametrize("name", sorted(set(EXIT_CODES) - {"NormfuseError"}))
def test_all_errors_are_caught_by_their_base(name: str) -> None:
    assert issubclass(getattr(errors, name), NormfuseError)


def test_reasons_are_sentences_that_can_be_told_apart() -> None:
    texts = [reason.value for reason in Reason]
    assert len(set(texts)) == len(texts)
    assert all(text and not text.endswith(".") for text in texts)


def test_reports_are_plain_for_json() -> None:
    refusal = Refusal("norm", Reason.SHARED, "read by add", layer="blocks.0.norm")
    report = PassReport(name="p", applied=PassReport.count(["a", "b", "a"]), refused=(refusal,), seconds=1.23456)
    assert report.as_dict() == {
        "name": "p",
        "applied": {"a": 2, "b": 1},
        "refused": [
            {
                "node": "norm",
                "layer": "blocks.0.norm",
                "reason": "shared",
                "because": "another node reads it",
                "detail": "read by add",
            }
        ],
        "sites": [],
        "seconds": 1.235,
    }
    assert report.changed
    assert not PassReport(name="p", refused=(refusal,)).changed
