"""Prompts, histories and answers of other tools' rows: each text is in its place, or the row is refused."""

from __future__ import annotations

import pytest

from engine.config.schema import DataConfig
from engine.data.examples import PromptsDifferError
from engine.data.rows import RowReader
from engine.data.sources import Row
from engine.errors import UserError
from tests.engine.data.layout_rows import ASK, BAD, EARLIER, GOOD, KIND, SIDES, SIDES_OF_TURNS, reply, system, user


def read(data, **options):
    return RowReader(DataConfig(dataset_name="x", **options), use_messages=True)(Row(0, data, "f.jsonl"))


HISTORY = [["hi", "hello"]]
BELOW = user(f"{ASK}\nContext.")


@pytest.mark.parametrize(
    ("data", "options", "prompt"),
    [
        ({"instruction": [user(ASK)], "input": "Context.", **SIDES}, {}, [BELOW]),
        ({"instruction": ASK, "input": "Context.", "output": [GOOD, BAD]}, {}, [BELOW]),
        ({"ask": [user(ASK)], "input": "Context.", **SIDES}, {"columns": {"prompt": "ask"}}, [BELOW]),
        ({"question": [system(KIND), user(ASK)], "history": HISTORY, **SIDES}, {},
         [system(KIND), *EARLIER, user(ASK)]),
        ({"system": KIND, "prompt": ASK, "history": HISTORY, **SIDES_OF_TURNS}, {},
         [system(KIND), *EARLIER, user(ASK)]),
        ({"messages": [user(ASK), reply(GOOD + "\n")], **SIDES}, {}, [user(ASK)]),
        ({"instruction": ASK, "chosen": [user(ASK), reply(GOOD)], "rejected": BAD}, {}, [user(ASK)]),
        ({"prompt": "\n\nHuman: a\n\nHuman: b\n\nAssistant:", "answers": [
            {"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 2}]}, {}, [user("a\n\nHuman: b")]),
    ],
)  # fmt: skip
def test_every_text_is_in_its_place(data, options, prompt):
    example = read(data, **options)
    assert example.prompt == prompt
    assert example.completions == ([reply(GOOD)], [reply(BAD)])


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"messages": [user(ASK), reply("c")], **SIDES}, {}, "the prompt ends with an answer"),
        ({"prompt": [user(ASK)], "chosen": [system(KIND), user(ASK), reply(GOOD)], "rejected": [reply(BAD)]}, {},
         "a completion begins with a turn of the system"),
        ({"instruction": [*EARLIER], "input": "Context.", **SIDES}, {}, "the prompt does not end with the user"),
        ({"prompt": ASK, "history": HISTORY, "chosen": [user(ASK), reply("a")], "rejected": [user(ASK), reply("b")]},
         {"format": "conversation"}, "column 'history' is not read"),
        ({"prompt": ASK, **SIDES, "mark": 1}, {"columns": {"label": "mark"}},
         r"data\.columns\.label is mark, but rows of the layout preference have no label"),
        ({"question": ASK, "chosen": [user("?"), reply(GOOD)], "rejected": BAD}, {},
         "a completion begins with a turn of the user"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(data, options, message):
    with pytest.raises(UserError, match=message):
        read(data, **options)


@pytest.mark.parametrize(
    "data",
    [
        {"conversation_a": [user("a"), reply("b"), user("c"), reply("d")], "winner": "tie",
         "conversation_b": [user("a"), reply("B"), user("C"), reply("D")]},
        {"chosen": [system(KIND), user("a"), reply("b")], "rejected": [system(KIND), user("A"), reply("b")]},
    ],
)  # fmt: skip
def test_sides_that_answer_other_turns_have_different_prompts(data):
    with pytest.raises(PromptsDifferError):
        read(data)
