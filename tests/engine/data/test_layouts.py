"""Layouts of other tools: every text of a row reaches the model as it does in TRL, or the run stops by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from engine.config.schema import DataConfig, RowFormat
from engine.data import check_files, load_dataset_groups
from engine.data.columns import COLUMNS
from engine.data.foreign import FOREIGN
from engine.errors import UserError
from tests.engine.data.layout_rows import (
    ASK,
    BAD,
    GOOD,
    KIND,
    KIND_PAIR,
    LAYOUTS,
    PAIR,
    SIDES,
    TOKENS,
    UNPAIRED,
    reply,
    said,
    user,
)
from tests.engine.data.test_tokenize import trl_ids

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(*rows, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(dataset_name=str(path), max_length=None, **data)
        return load_dataset_groups(config, tokenizer, split="train")

    return load


def ids(dataset):
    return [(g.prompt_ids.tolist(), *(r.tolist() for r in g.response_ids)) for g in dataset]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_ids_of_trl_for_the_same_row_as_messages(load, tokenizer, name):
    layout, row, messages = LAYOUTS[name]
    # One row beside another, since Arrow gives them the keys of both otherwise.
    expected = trl_ids([messages], tokenizer, None)
    dataset, report = load(row)
    assert report.layout == layout
    assert ids(dataset) == expected
    explicit, _ = load(row, format=layout)
    assert ids(explicit) == expected


@pytest.mark.parametrize("name", TOKENS)
def test_ids_are_those_of_the_row(load, name):
    layout, row = TOKENS[name]
    dataset, report = load(row)
    assert report.layout == layout
    assert ids(dataset) == [([5, 6], [7, 2], [8, 9, 2])]


def keys_of(value) -> set[str]:
    """Names of columns and of fields inside them."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_every_line_of_the_table_and_every_column_in_it_has_a_row_that_a_test_reads():
    table = DOCS.read_text(encoding="utf-8").partition("## Layouts")[2].partition("\n## ")[0]
    lines = [
        line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| `") and "known" not in line
    ]
    listed = {
        name.strip(" `"): {
            word for part in re.findall("`([^`]+)`", cell) for word in part.split(", ") if word.isidentifier()
        }
        for name, cell, _ in lines
    }
    formats = {name for name in RowFormat.__args__ if name != "auto"}
    assert listed.keys() == formats == FOREIGN.keys() | COLUMNS.keys()
    read = {name: set() for name in formats}
    for layout, row, *_ in (*LAYOUTS.values(), *TOKENS.values(), *UNPAIRED.values()):
        read[layout] |= keys_of(row)
    assert {name: columns - read[name] for name, columns in listed.items() if columns - read[name]} == {}
    assert get_type_hints(DataConfig)["format"] == RowFormat


def test_ids_of_old_trl(load):
    expected = [([5, 6], [7, 2], [8, 9, 2])]
    sides = {"chosen_input_ids": [7, 2], "rejected_input_ids": [8, 9, 2]}
    dataset, report = load({"prompt_input_ids": [5, 6], **sides, "prompt": "text"})
    assert (report.layout, ids(dataset)) == ("input_ids", expected)
    whole = {f"{side}_input_ids": [5, 6, *answer] for side, answer in (("chosen", [7, 2]), ("rejected", [8, 9, 2]))}
    labels = {"chosen_labels": [-100, -100, 7, 2], "rejected_labels": [-100, -100, 8, 9, 2]}
    assert ids(load({"prompt_input_ids": [5, 6], **whole, **labels})[0]) == expected
    padded = {name: [*values, 0] for name, values in whole.items()}
    assert ids(load(padded | {name: [*values, -100] for name, values in labels.items()})[0]) == expected
    with pytest.raises(UserError, match="'chosen_labels' must have one run of labels"):
        load(whole | labels | {"chosen_input_ids": [5, 6, 7, 3, 2], "chosen_labels": [-100, -100, 7, -100, 2]})


MAPPED = {"ask": ASK, "good": GOOD, "bad": BAD}
NAMES = {"prompt": "ask", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (MAPPED, {"columns": NAMES}, PAIR),
        (MAPPED | {"persona": KIND}, {"columns": NAMES | {"system": "persona"}}, KIND_PAIR),
        (MAPPED, {"columns": NAMES, "system": KIND}, KIND_PAIR),
        (PAIR, {"system": KIND}, KIND_PAIR),
        (KIND_PAIR, {"system": "another"}, KIND_PAIR),
        ({"prompt": ASK, **SIDES}, {"system": KIND}, KIND_PAIR),
        ({"prompt": ASK, **SIDES}, {"format": "conversation"}, PAIR),
        (
            {"talk": [{"who": "customer", "text": ASK}], "good": {"who": "agent", "text": GOOD}, "bad": BAD},
            {
                "columns": NAMES | {"prompt": "talk"},
                "turn_fields": {"role": "who", "content": "text"},
                "roles": {"customer": "user", "agent": "assistant"},
            },
            PAIR,
        ),
        (
            {"prompt": [said("narrator", ASK)], "chosen": said("gpt", GOOD), "rejected": said("gpt", BAD)},
            {"roles": {"narrator": "user"}},
            PAIR,
        ),
        ({"prompt": ASK, "answers": [BAD, GOOD], "marks": [1, 2]},
         {"columns": {"responses": "answers", "scores": "marks"}, "system": KIND}, KIND_PAIR),
        (
            {"prompt": ASK, "response_0": GOOD, "response_1": BAD, "better_response_id": 1, "safer_response_id": 0},
            {"columns": {"label": "safer_response_id"}},
            PAIR,
        ),
    ],
)  # fmt: skip
def test_columns_fields_roles_and_system_are_mapped(load, tokenizer, row, options, expected):
    assert ids(load(row, **options)[0]) == trl_ids([expected], tokenizer, None)


def test_mapped_text_stays_text_where_that_is_asked_for(load, tokenizer):
    row = {"prompt": ASK, **SIDES}
    assert ids(load(MAPPED, columns=NAMES, format="preference")[0]) == trl_ids([row], tokenizer, None)
    assert ids(load(row)[0]) == trl_ids([row], tokenizer, None)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "Go on.", "question": ASK, **SIDES}, "question"),
        ({"prompt": "Go on.", "input": ASK, **SIDES}, "input"),
        ({"prompt": "Go on.", "messages": [user(ASK)], **SIDES}, "messages"),
        ({**PAIR, "context": ASK + " And when?"}, "context"),
        ({"conversations": [user(ASK)], **SIDES, "system_prompt": "", "system": "", "instruction": "Sing."}, "instr"),
        ({"chosen": [user("hi"), reply("a")], "rejected": [user("hi"), reply("b")], "dialogue": [said("human", ASK)]},
         "dialogue"),
        ({**KIND_PAIR, "system": "Shout."}, "system"),
        ({"prompt": ASK, **SIDES, "tools": [{"name": "clock"}]}, "tools"),
        ({"prompt": ASK, **SIDES, "Query": "Why?"}, "Query"),
    ],
)  # fmt: skip
def test_a_column_that_looks_like_a_prompt_and_is_not_read_stops_by_name(load, row, name):
    with pytest.raises(
        UserError, match=rf"rows\.jsonl, row 0 .*column '{name}\w*' is not read.*data\.(columns|format)"
    ):
        load(row)


def test_a_later_row_with_a_text_of_its_own_stops(load):
    with pytest.raises(UserError, match=r"row 1 .*column 'system' is not read"):
        load({"prompt": ASK, **SIDES}, {"prompt": ASK, **SIDES, "system": KIND})


def test_columns_that_were_decided_on_are_left_out(load, tokenizer):
    plain = {"prompt": ASK, **SIDES}
    expected = trl_ids([plain], tokenizer, None)
    assert ids(load(plain | {"system": KIND}, columns={"system": None})[0]) == expected
    assert ids(load(plain | {"question": "Why?"}, columns={"prompt": "prompt"}, format="preference")[0]) == expected
    implicit = {name: ASK + " " + text for name, text in SIDES.items()}
    assert ids(load(implicit | {"question": "Why?"}, columns={"prompt": None})[0]) == trl_ids(
        [implicit], tokenizer, None
    )


def test_a_prompt_that_is_empty_in_every_row_stops(load):
    empty = {"prompt": " ", **SIDES}
    with pytest.raises(UserError, match=r"none of 2 rows can be used \(no_prompt_tokens 2\)"):
        load(empty, {"prompt": "", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=r"the prompt is empty in all 2 rows.*data\.columns"):
        load(empty, {"prompt": "", "chosen": "a", "rejected": "b"}, format="conversation")
    assert len(load(empty, {"prompt": ASK, **SIDES}, format="conversation")[0]) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ASK, "response": GOOD, "helpfulness": 3}, "rows with one answer each, here response, are no pref"),
        ({"question": ASK, "chosen": GOOD}, "no known layout .*data.columns: {prompt: COLUMN"),
        ({"messages": [user(ASK)], "rejected_response": BAD}, "'messages' must end with the answer that was chosen"),
        ({"instruction": ASK, "output": [GOOD]}, "'output' needs two answers"),
        ({"input": {"prompt": ASK}, "preferred_output": [], "non_preferred_output": []}, "an object with messages"),
        ({"prompt": ASK, "response_0": GOOD, "response_1": BAD, "better_response_id": 2}, "must be 0 or 1, got 2"),
        ({"prompt": ASK, "response_1": GOOD, "response_2": BAD, "preference_strength": None}, "strength' is empty"),
        ({"prompt": ASK, "answers": [{"answer": GOOD, "rank": "first"}]}, "needs a number as every rank"),
        ({"instruction": ASK, "history": ["hi"], **SIDES}, "'history' must be a list of .question, answer."),
        (PAIR | {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]},
         "part of type image, but only text"),
        (PAIR | {"prompt": [{"role": "user", "content": [{"kind": 3}]}]}, "has a part without a type and text"),
        (PAIR | {"chosen": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "{city"}}]}]}, "text that is no JSON object"),
        (PAIR | {"tools": 3}, "'tools' must be a list, got int"),
        ({"chosen": "[{'role': 'user', 'content': array([1])}]", "rejected": BAD}, "as Python prints it"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(load, row, message):
    with pytest.raises(UserError, match=r"rows\.jsonl, row 0 .*" + message):
        load(row)


@pytest.mark.parametrize("tools", [[], "[]", {}, "", None, "null"])
def test_no_tools_are_none(load, tokenizer, tools):
    assert ids(load(PAIR | {"tools": tools})[0]) == trl_ids([PAIR], tokenizer, None)


def test_nulls_stay_where_that_is_asked_for(load, tokenizer):
    row = LAYOUTS["filler nulls"][1]
    assert ids(load(row, remove_none_values=False)[0]) != ids(load(row)[0])


def test_missing_mapped_columns_are_named(load):
    with pytest.raises(UserError, match=r"row 0 .*data\.columns\.prompt is ask; found columns"):
        load({"prompt": ASK, **SIDES}, columns={"prompt": "ask"})
    with pytest.raises(ValueError, match=r"data\.columns has no part promt; parts are prompt"):
        DataConfig(dataset_name="x", columns={"promt": "ask"})


OPTIONAL_PARTS = ("system", "input", "history", "tools", "chat_template_kwargs", "ref_chosen_logps", "ref_logps")


@pytest.mark.parametrize("part", OPTIONAL_PARTS)
def test_a_column_that_no_row_has_is_named(load, tmp_path, part):
    columns = {**NAMES, part: "nosuch"}
    absent = rf"row 0 .*data\.columns\.{part} is nosuch; found columns ask, bad, good"
    for format in ("auto", "preference"):
        with pytest.raises(UserError, match=absent):
            load(MAPPED, MAPPED, columns=columns, format=format)
    with pytest.raises(UserError, match=absent):
        check_files(DataConfig(dataset_name=str(tmp_path / "rows.jsonl"), columns=columns))


def test_a_column_that_some_rows_lack_is_read(load, tmp_path, tokenizer):
    columns = {**NAMES, "system": "persona"}
    dataset, _ = load(MAPPED, MAPPED | {"persona": KIND}, columns=columns)
    assert ids(dataset) == [*trl_ids([PAIR], tokenizer, None), *trl_ids([KIND_PAIR], tokenizer, None)]
    check_files(DataConfig(dataset_name=str(tmp_path / "rows.jsonl"), columns=columns))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (MAPPED, {"columns": NAMES},
         r"text in columns that data\.columns names .*, or data\.format: preference to keep"),
        (MAPPED | {"persona": KIND}, {"columns": {**NAMES, "system": "persona"}},
         r", or data\.format: preference and data\.columns\.system: null to keep it as text"),
        ({"prompt": ASK, **SIDES}, {"system": KIND}, r"text beside data\.system .*, or data\.system: null to keep"),
        (MAPPED, {"columns": NAMES, "system": KIND}, r", or data\.format: preference and data\.system: null to keep"),
        ({"question": ASK, **SIDES}, {}, r"text of the layout question .* to a Jinja file$"),
    ],
)  # fmt: skip
def test_text_that_would_be_turns_says_why_and_how_it_stays_text(tmp_path, plain_tokenizer, row, options, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    config = DataConfig(dataset_name=str(path), **options)
    with pytest.raises(UserError, match=r"row 0 .*is laid out as turns, but no chat template is in use") as refused:
        load_dataset_groups(config, plain_tokenizer, split="train")
    assert re.search(message, str(refused.value))


def test_layouts_of_turns_need_a_template(tmp_path, plain_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": ASK, **SIDES}))
    with pytest.raises(UserError, match="no chat template is in use"):
        load_dataset_groups(DataConfig(dataset_name=str(path)), plain_tokenizer, split="train")
