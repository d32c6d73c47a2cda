"""Rows in the layouts of other trainers are read, by what a file was converted to, as the turns that are meant."""

from __future__ import annotations

import json

import pytest

from engine.config import build_config
from engine.data.rows import RowReader
from engine.data.sources import Row

from .recipes import convert

ASKED = [{"role": "user", "content": "Q"}]
CHATS = {"chosen": {"role": "assistant", "content": "A"}, "rejected": {"role": "assistant", "content": "B"}}
HEAD = "base_model: m\nrl: dpo\nlearning_rate: 1\ndatasets:\n- "
INFO = {
    "asked": {"file_name": "x.json", "ranking": True,
              "columns": {"prompt": "question", "query": "more", "system": "sys", "chosen": "good", "rejected": "bad"}},
    "talk": {"file_name": "x.json", "ranking": True, "formatting": "sharegpt",
             "columns": {"messages": "turns", "chosen": "good", "rejected": "bad"},
             "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "clerk"}},
}  # fmt: skip


def factory(name: str) -> str:
    """A file of LLaMA-Factory with one data set."""
    return f"model_name_or_path: m\nstage: dpo\nfinetuning_type: full\ndataset: {name}\n"


@pytest.mark.parametrize(
    ("text", "row", "prompt"),
    [
        (HEAD + "{path: d, type: chat_template.default, field_messages: conversation}",
         {"conversation": ASKED, **CHATS}, ASKED),
        (HEAD + "{path: d, type: chat_template.default, field_messages: conversation}",
         {"conversation": "Q", "chosen": "A", "rejected": "B"}, ASKED),
        (HEAD + "{path: d, type: chatml.intel}",
         {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
         [{"role": "system", "content": "S"}, *ASKED]),
        (HEAD + "{path: d, type: chatml.argilla}",
         {"instruction": "Q", "chosen_response": "A", "rejected_response": "B"}, ASKED),
        (HEAD + "{path: d, type: llama3.icr}", {"input": "Q", "chosen": "A", "rejected": "B"}, ASKED),
        (HEAD + "{path: d, type: chatml.ultra}",
         {"prompt": "Q", "chosen": [*ASKED, CHATS["chosen"]], "rejected": [*ASKED, CHATS["rejected"]]}, ASKED),
        (HEAD + "{path: d, type: {field_prompt: ask, field_chosen: good, field_rejected: bad}}",
         {"ask": "Q", "good": "A", "bad": "B"}, ASKED),
        (factory("asked"), {"question": "Q", "more": "ctx", "sys": "S", "good": "A", "bad": "B"},
         [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\nctx"}]),
        (factory("talk"), {"turns": [{"who": "customer", "says": "Q"}], "good": {"who": "clerk", "says": "A"},
                           "bad": {"who": "clerk", "says": "B"}}, ASKED),
        ("rlhf_type: dpo\nmodel: m\ndataset: d\n",
         {"messages": [*ASKED, CHATS["chosen"]], "rejected_response": "B"}, ASKED),
    ],
)  # fmt: skip
def test_rows_are_read_as_they_are_meant(text, row, prompt, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    data = build_config(convert(tmp_path / "file.yaml", text + "\n").values, "file.yaml").data
    read = RowReader(data, use_messages=True)(Row(0, row, "file"))
    assert read.prompt == prompt
    assert [side[-1]["content"] for side in read.completions] == ["A", "B"]
