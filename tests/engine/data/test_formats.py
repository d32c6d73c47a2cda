"""Every layout becomes a prompt and ranked completions, or an error that names the row."""

from __future__ import annotations

import json

import pytest

from engine.data.columns import COLUMNS, SHOWN_BY, detect_format, layouts
from engine.data.examples import PromptsDifferError
from engine.data.foreign import FOREIGN
from engine.data.formats import reader_for, split_implicit_prompt
from engine.data.sources import Row
from engine.errors import UserError


def row(**data):
    return Row(4, data, "f.jsonl", 5)


def turn(role, content):
    return {"role": role, "content": content}


def said(speaker, value):
    return {"from": speaker, "value": value}


USER, GOOD, BAD = turn("user", "hi"), turn("assistant", "good"), turn("assistant", "bad")
HH_GOOD = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: go on\n\nAssistant: good"
HH_BAD = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: go on\n\nAssistant: bad"


def read(data: Row, *, use_messages: bool = True):
    return reader_for(detect_format(data), use_messages=use_messages)(data)


@pytest.mark.parametrize(
    ("data", "layout", "kind", "prompt", "completions"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference", "text", "p", ("c", "r")),
        ({"chosen": "It is a", "rejected": "It is b"}, "preference", "text", "It is", (" a", " b")),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            "preference",
            "messages",
            [USER],
            ([GOOD], [BAD]),
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "preference", "messages", [USER], ([GOOD], [BAD])),
        # A text prompt that only repeats the first turn, and one that stands alone.
        (
            {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "preference",
            "messages",
            [USER],
            ([GOOD], [BAD]),
        ),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, "preference", "messages", [USER], ([GOOD], [BAD])),
        (
            {"conversations": [said("human", "hi")], "chosen": said("gpt", "good"), "rejected": said("gpt", "bad")},
            "sharegpt",
            "messages",
            [USER],
            ([GOOD], [BAD]),
        ),
        (
            {
                "conversations": [said("human", "hi"), said("observation", "42")],
                "chosen": [said("gpt", "good")],
                "rejected": "bad",
                "system": "be kind",
            },
            "sharegpt",
            "messages",
            [turn("system", "be kind"), USER, turn("tool", "42")],
            ([GOOD], [BAD]),
        ),
        (
            {"conversations": [turn("system", "s"), USER], "chosen": GOOD, "rejected": BAD, "system": "ignored"},
            "sharegpt",
            "messages",
            [turn("system", "s"), USER],
            ([GOOD], [BAD]),
        ),
        (
            {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
            "tokenized",
            "ids",
            [1, 2],
            ([3], [4, 5]),
        ),
        (
            {"prompt": "p", "responses": ["third", "first", "second"], "ranking": [3, 1, 2]},
            "kwise",
            "text",
            "p",
            ("first", "second", "third"),
        ),
        (
            {"prompt": [USER], "responses": ["bad", [GOOD]], "ranking": [1, 0]},
            "kwise",
            "messages",
            [USER],
            ([GOOD], [BAD]),
        ),
    ],
)
def test_layout(data, layout, kind, prompt, completions):
    data = row(**data)
    assert detect_format(data) == layout
    example = read(data)
    assert (example.kind, example.prompt, example.completions) == (kind, prompt, completions)
    assert (example.row, example.ref_logps) == (4, None)


def test_hh_dialogue_as_text_keeps_every_character():
    data = row(chosen=HH_GOOD, rejected=HH_BAD)
    assert detect_format(data) == "hh"
    example = read(data, use_messages=False)
    assert example.prompt == "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: go on\n\nAssistant:"
    assert example.completions == (" good", " bad")


def test_hh_dialogue_as_messages():
    example = read(row(chosen=HH_GOOD, rejected=HH_BAD))
    assert example.prompt == [turn("user", "hi"), turn("assistant", "yes?"), turn("user", "go on")]
    assert example.completions == ([GOOD], [BAD])


def test_hh_turns_of_one_speaker_in_a_row_are_joined():
    start = "\n\nHuman: hi\n\nHuman: there\n\nAssistant:"
    assert read(row(chosen=start + " a", rejected=start + " b")).prompt == [turn("user", "hi\n\nthere")]


@pytest.mark.parametrize("use_messages", [False, True])
def test_hh_sides_with_different_prompts(use_messages):
    with pytest.raises(PromptsDifferError):
        read(row(chosen=HH_GOOD, rejected=HH_BAD.replace("go on", "stop")), use_messages=use_messages)


def test_messages_without_a_shared_turn_have_different_prompts():
    with pytest.raises(PromptsDifferError):
        read(row(chosen=[turn("user", "a"), GOOD], rejected=[turn("user", "b"), BAD]))


def test_hh_text_beside_a_prompt_column_is_plain_text():
    assert detect_format(row(prompt="", chosen=HH_GOOD, rejected=HH_BAD)) == "preference"


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue", "The sky is green", ("The sky is", " blue", " green")),
        ("abcd", "abce", ("abc", "d", "e")),
        ("same", "same", ("sam", "e", "e")),
        ("ab", "abc", ("a", "b", "bc")),
        ("a b", "a ", ("a", " b", " ")),
        ("x ", "y ", ("", "x ", "y ")),
        ("", "y", ("", "", "y")),
        ([1, 2, 3], [1, 2, 4, 5], ([1, 2], [3], [4, 5])),
    ],
)
def test_implicit_prompt(chosen, rejected, expected):
    assert split_implicit_prompt(chosen, rejected) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("The sky is blue", "The sky is green"), ("abcd", "abce"), ("same", "same"), ("ab", "abc"), ("a b", "a c")],
)
def test_implicit_prompt_as_trl(chosen, rejected):
    trl = pytest.importorskip("trl")
    theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
    assert split_implicit_prompt(chosen, rejected) == tuple(theirs.values())


def test_reference_columns():
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert read(row(**pair, ref_chosen_logps=-3, ref_rejected_logps=-4.5)).ref_logps == (-3.0, -4.5)
    assert read(row(**pair, ref_chosen_logps=None, ref_rejected_logps=None)).ref_logps is None
    ranked = row(prompt="p", responses=["b", "a"], ranking=[2, 1], ref_logps=[-2.0, -1.0])
    assert read(ranked).ref_logps == (-1.0, -2.0)
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    assert read(row(**ids, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0)).ref_logps == (-1.0, -2.0)


def test_template_arguments_of_a_row():
    tools = [{"name": "clock"}]
    pair = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    for given in (tools, json.dumps(tools)):
        example = read(row(**pair, tools=given, chat_template_kwargs={"thinking": False}))
        assert example.template_kwargs == {"tools": tools, "thinking": False}
    assert read(row(**pair, tools=None, chat_template_kwargs=None)).template_kwargs == {"tools": None}


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
RANKED = {"prompt": "p", "responses": ["a", "b"], "ranking": [1, 2]}
IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
SHARED = {"conversations": [said("human", "hi")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"question": "q", "chosen": "c"},
            "no known layout has the columns chosen, question; rename them, or set data.columns",
        ),
        (PAIR | {"chosen": None}, "column 'chosen' is empty; found columns chosen, prompt, rejected; preference rows"),
        (PAIR | {"prompt": None}, "column 'prompt' is empty"),
        (PAIR | {"chosen": 3}, "all be text or all be non-empty message lists, got prompt: str, chosen: int"),
        (PAIR | {"chosen": []}, "all be text or all be non-empty message lists"),
        (PAIR | {"prompt": [USER]}, "all be text or all be non-empty message lists, got prompt: list"),
        (PAIR | {"images": ["x.png"]}, "the row has images"),
        (PAIR | {"ref_chosen_logps": -1.0}, r"must be finite numbers, got \[-1.0, None\]"),
        (PAIR | {"ref_chosen_logps": -1.0, "ref_rejected_logps": float("nan")}, "must be finite numbers"),
        (CHAT | {"chosen": [{"text": "x"}]}, "a turn of column 'chosen' has text; expected role and content"),
        (CHAT | {"tools": "[{"}, "column 'tools' holds broken JSON"),
        (CHAT | {"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object, got list"),
        (SHARED | {"conversations": [said("narrator", "x")]}, "has a turn from 'narrator'; known are human, user"),
        (SHARED | {"conversations": []}, "column 'conversations' has no turns"),
        (SHARED | {"conversations": "x"}, "column 'conversations' must be a list of messages, got str"),
        (RANKED | {"responses": ["a"], "ranking": [1]}, "'responses' needs a list of at least 2 responses, got 1"),
        (RANKED | {"responses": "ab"}, "'responses' needs a list of at least 2 responses, got str"),
        (RANKED | {"ranking": [1]}, "'ranking' needs one rank for each of 2 responses, got 1"),
        (RANKED | {"ranking": [1, 1]}, r"'ranking' has ties \(\[1, 1\]\)"),
        (RANKED | {"ranking": [1, "x"]}, "'ranking' must be finite numbers"),
        (RANKED | {"responses": ["a", [GOOD]]}, "every response must be text"),
        (RANKED | {"prompt": []}, "column 'prompt' has no turns"),
        (RANKED | {"ref_logps": [-1.0]}, "'ref_logps' needs one number for each of 2 responses"),
        (IDS | {"chosen_ids": [1, "x"]}, "column 'chosen_ids' must be a list of token ids"),
        (IDS | {"chosen_ids": [-1]}, "column 'chosen_ids' must be a list of token ids"),
    ],
)
def test_bad_row_is_named(data, message):
    with pytest.raises(UserError, match=r"^f\.jsonl, row 4 \(line 5\): .*" + message):
        read(row(**data))


def test_missing_column_names_what_was_found_and_what_is_needed():
    reader = reader_for("preference", use_messages=False)
    with pytest.raises(UserError) as error:
        reader(row(prompt="p", chosen="c", reject="r"))
    assert str(error.value) == (
        "f.jsonl, row 4 (line 5): column 'rejected' is missing; found columns chosen, prompt, reject; "
        "preference rows need chosen, rejected (is reject meant to be rejected?)"
    )


def test_columns_of_no_layout_name_near_ones_and_all_layouts():
    with pytest.raises(UserError) as error:
        detect_format(row(Prompt="p", choosen="c", rejected="r", id=1))
    text = str(error.value)
    assert text.startswith("f.jsonl, row 4 (line 5): no known layout has the columns Prompt, choosen, id, rejected (is")
    assert text.endswith("(is Prompt meant to be prompt?) (is choosen meant to be chosen?); " + SHOWN_BY)
    listed = layouts().splitlines()
    assert all(any(line.split()[0] == name for line in listed[1:]) for name in COLUMNS)
    assert all(name in layouts() for name in FOREIGN)
    assert len(listed) <= 12
    assert r"chosen, rejected whose turns begin with '\n\nHuman:' and '\n\nAssistant:', as in Anthropic HH" in layouts()


@pytest.mark.parametrize("name", [lambda i: f"column_{i:02}", lambda i: f"chosen{i:02}", lambda i: f"{i:02}" * 100])
def test_many_or_long_columns_are_told_in_short(name):
    with pytest.raises(UserError) as error:
        detect_format(row(**{name(i): "x" for i in range(60)}))
    assert " and 52 more" in str(error.value)
    assert len(str(error.value)) < 700


def test_columns_of_another_layout_name_it():
    with pytest.raises(UserError, match=r"kwise rows need .*; these columns fit data\.format preference, or auto"):
        reader_for("kwise", use_messages=False)(row(prompt="p", chosen="c", rejected="r"))


def test_a_misspelt_prompt_is_no_row_without_a_prompt():
    with pytest.raises(UserError, match=r"column 'promt' is not read .*prompt.*data\.format to preference"):
        detect_format(row(promt="p", chosen="p c", rejected="p r"))
    for other in ("promptId", "prompt_id", "prompt_text", "prompter", "prompted"):
        assert detect_format(row(chosen="p c", rejected="p r", **{other: "p"})) == "preference"
    assert detect_format(row(prompt_id="p", chosen="p c", rejected="p r")) == "preference"


def test_row_that_is_no_dialogue_says_what_to_do():
    with pytest.raises(UserError, match=r"'chosen' is not a dialogue .* set data\.format: preference"):
        reader_for("hh", use_messages=False)(row(chosen="x", rejected=HH_BAD))
    with pytest.raises(UserError, match="no turn before its last"):
        reader_for("hh", use_messages=True)(row(chosen="\n\nAssistant: a", rejected="\n\nAssistant: b"))
