"""Tables of damages: added up, written, read again, and never below zero."""

from __future__ import annotations

import json

from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally

TABLE = Sensitivity(
    method="by hand",
    weights={"a": {2: 0.1 + 0.2, 8: 5e-324}, "b": {}},
    activations={"y": {3: 1e300}},
    facts={"conserved": 1 / 3},
)


def filled() -> Tally:
    tally = Tally()
    for amount in (1.5, 2.25):
        tally.add(Kind.WEIGHT, "a", 2, amount)
    tally.add(Kind.WEIGHT, "a", 8, -1e-20)
    tally.add(Kind.WEIGHT, "b", 2, 7.0)
    tally.add(Kind.ACTIVATION, "a", 2, 0.5)
    return tally


def test_tables_come_back_from_json_as_they_were() -> None:
    assert Sensitivity.from_dict(json.loads(json.dumps(TABLE.as_dict()))) == TABLE


def test_a_table_has_no_facts_of_its_own() -> None:
    assert Sensitivity(method="any", weights={}, activations={}).as_dict()["facts"] == {}


def test_kinds_have_a_table_each() -> None:
    assert TABLE.of(Kind.WEIGHT) is TABLE.weights
    assert TABLE.of(Kind.ACTIVATION) is TABLE.activations


def test_parts_of_one_name_and_two_kinds_are_two() -> None:
    assert filled().of(Kind.WEIGHT) == {"a": {2: 3.75, 8: -1e-20}, "b": {2: 7.0}}
    assert filled().of(Kind.ACTIVATION) == {"a": {2: 0.5}}


def test_what_came_out_below_zero_is_zero() -> None:
    assert filled().sensitivity("any", conserved=0.5) == Sensitivity(
        method="any",
        weights={"a": {2: 3.75, 8: 0.0}, "b": {2: 7.0}},
        activations={"a": {2: 0.5}},
        facts={"conserved": 0.5},
    )


def test_a_tally_goes_on_from_what_was_kept() -> None:
    """In the place of what it had, and below zero too."""
    other = Tally()
    other.add(Kind.WEIGHT, "of before", 2, 1.0)
    other.restore(json.loads(json.dumps(filled().as_dict())))
    for kind in Kind:
        assert other.of(kind) == filled().of(kind)
    other.add(Kind.WEIGHT, "a", 2, 1.0)
    other.add(Kind.ACTIVATION, "of later", 3, 1.0)
    assert other.of(Kind.WEIGHT)["a"] == {2: 4.75, 8: -1e-20}
    assert other.of(Kind.ACTIVATION)["of later"] == {3: 1.0}
