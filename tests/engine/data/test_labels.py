"""Labels, strengths and winners: which answer is the better one."""

from __future__ import annotations

import pytest

from engine.config.schema import DataConfig
from engine.data.rows import RowReader
from engine.data.sources import Row
from engine.errors import UserError
from tests.engine.data.layout_rows import ASK, BAD, GOOD, reply, user

PKU = {"prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 1}
SHP = {"history": ASK, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}
HELPSTEER = {"prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference_strength": 2}
ARENA = {
    "conversation_a": [user(ASK), reply(BAD)],
    "conversation_b": [user(ASK), reply(GOOD)],
    "winner": "model_b",
}


def read(data, **options):
    return RowReader(DataConfig(dataset_name="x", **options), use_messages=True)(Row(0, data, "f.jsonl"))


@pytest.mark.parametrize("data", [PKU, SHP, HELPSTEER, ARENA])
@pytest.mark.parametrize("label", [0, 1, "toxic"])
def test_a_column_called_label_decides_nothing(data, label):
    assert read(data | {"label": label}).completions[0] == [reply(GOOD)]


@pytest.mark.parametrize(("data", "mark"), [(PKU, 0), (SHP, 1), (HELPSTEER, -1), (HELPSTEER, "-1"), (ARENA, "model_a")])
def test_a_label_that_is_named_decides(data, mark):
    assert read(data | {"mark": mark}, columns={"label": "mark"}).completions[0] == [reply(BAD)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HELPSTEER | {"preference_strength": True}, "'preference_strength' must be finite numbers"),
        (PKU | {"better_response_id": True}, "must be 0 or 1, got True"),
        (ARENA | {"winner": "A"}, "'winner' must be one of model_a, model_b, tie.*got 'A'"),
    ],
)
def test_other_values_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        read(data)


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_ties_are_equal(winner):
    assert read(ARENA | {"winner": winner}).scores == (0.0, 0.0)
