"""Text of columns that are not read: the prompt holds it as a block, or the row is refused."""

from __future__ import annotations

import pytest

from engine.config.schema import DataConfig
from engine.data.rows import RowReader
from engine.data.sources import Row
from engine.errors import UserError
from tests.engine.data.layout_rows import SIDES

LONG = "A text of more than sixty characters, which nobody writes twice by chance."


def read(data, **options):
    return RowReader(DataConfig(dataset_name="x", **options), use_messages=True)(Row(0, data, "f.jsonl"))


@pytest.mark.parametrize(
    ("prompt", "columns"),
    [
        ("Why?", {"question": " Why?\n"}),
        ("Read it.\nThe river.\nWhy?", {"context": "The river.", "question": "Why?"}),
        ("Context: The river.\nQuestion: 'Why?' ", {"passage": "The river.", "question": "Why?"}),
        (f"Sum up {LONG} in a line", {"article": LONG, "post": 3, "document": None}),
    ],
)
def test_a_block_of_the_prompt_is_read(prompt, columns):
    assert read({"prompt": prompt, **SIDES, **columns}).prompt == prompt


@pytest.mark.parametrize("text", ["Why", "y", "Why? Sing.", "river"])
@pytest.mark.parametrize("name", ["question", "document", "post", "passage", "article", "text_input", "premise"])
def test_a_part_of_a_word_or_line_is_none(name, text):
    with pytest.raises(UserError, match=f"column '{name}' is not read"):
        read({"prompt": "The river runs. Why? ", **SIDES, name: text})


@pytest.mark.parametrize(
    "name",
    [
        "Question",
        " question",
        "user prompt",
        "original_question",
        "PROMPT_TEXT",
        "prompt_raw",
        "human",
        "task",
        "context",
    ],
)
def test_a_prompt_is_known_by_other_spellings(name):
    with pytest.raises(UserError, match=f"column '{name}' is not read"):
        read({"prompt": "Why?", **SIDES, name: "The river runs."})


@pytest.mark.parametrize("name", ["prompt_id", "prompt_source", "question_type", "user_id", "language", "subtask_name"])
def test_what_is_about_a_prompt_is_none(name):
    assert read({"prompt": "Why?", **SIDES, name: "The river runs."}).prompt == "Why?"


@pytest.mark.parametrize("name", ["documents", "passages", "Contexts", "knowledge"])
def test_documents_that_the_prompt_does_not_hold_stop(name):
    document = {"doc_id": "r-1", "title": "Rivers", "text": "The river runs."}
    for value in ([document], ["The river runs."], "The river runs."):
        with pytest.raises(UserError, match=f"column '{name}' is not read"):
            read({"prompt": "Why?", **SIDES, name: value})
        asked = "From this:\nThe river runs.\nWhy?"
        assert read({"prompt": asked, **SIDES, name: value}).prompt == asked


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("system", "Be kind."),
        ("system", "Why?"),
        ("system", None),
        ("tools", [{"name": "clock"}]),
        ("chat_template_kwargs", {"thinking": True}),
    ],
)
@pytest.mark.parametrize("column", ["mine", None])
def test_a_part_of_turns_that_is_named_beside_text_stops(name, value, column):
    column = column or name
    text = {"prompt": "Why?", **SIDES}
    refused = rf"f\.jsonl, row 0: data\.columns\.{name} has no place in data\.format: "
    with pytest.raises(UserError, match=refused + r"preference \(text has no turns\); set .*conversation"):
        read({**text, column: value}, columns={name: column}, format="preference")
    tokens = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    with pytest.raises(UserError, match=refused + r"tokenized \(a list of token ids has no turns\); set data\.columns"):
        read({**tokens, column: value}, columns={name: column})
