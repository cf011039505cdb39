"""What accuracy control does to bits that layers got, or that the user gave them."""

from __future__ import annotations

import pytest

from tests.mixing.mixed_network import bits_of, compiled


@pytest.mark.slow
def test_blocks_go_back_to_eight_bits_first_and_the_report_says_what_ships() -> None:
    built = compiled(budget="avg-bits=2", weight_widths="2,8", max_drop=8.0)
    control = built.report["accuracy_control"]
    assert control["trials"][0]["drop"] > 8.0 >= control["drop"]
    assert {each["level"] for each in control["put_back"]} == {"8"}
    back = {layer for each in control["put_back"] for layer in each["layers"]}
    bits = bits_of(built)
    assert {layer for layer, each in bits.items() if each == "w8a8"} == back
    assert {bits[layer] for layer in bits.keys() - back} <= {"w2a8"}
    parameters = {each["layer"]: each["parameters"] for each in built.report["mixed"]["layers"]}
    average = sum((8 if layer in back else 2) * count for layer, count in parameters.items()) / sum(parameters.values())
    assert built.report["mixed"]["average_weight_bits"] == pytest.approx(average)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bits": "8"}, {"budget": "avg-bits=8"}], ids=["uniform", "mixed"])
def test_bits_that_the_user_gave_are_never_put_back(options: dict[str, str]) -> None:
    built = compiled(overrides="up=2 down=2", max_drop=1.0, **options)
    control = built.report["accuracy_control"]
    assert control["trials"][0]["drop"] > 1.0
    assert not {"up", "down"} & {layer for each in control["put_back"] for layer in each["layers"]}
