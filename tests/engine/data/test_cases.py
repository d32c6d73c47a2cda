"""Small inputs beside a development checkout, each of which once trained on something else than its rows say."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.config.schema import DataConfig
from engine.data import load_dataset_groups
from engine.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(shared_dir):
    return AutoTokenizer.from_pretrained(shared_dir / "models" / "tiny-chat-llama")


@pytest.fixture
def read(shared_dir, tokenizer):
    """What the model reads of the rows of a case: (prompt, chosen, rejected) as text."""

    def read(case, file="rows.jsonl", template="auto"):
        if template != "auto":
            trl = pytest.importorskip("trl")
            template = str(Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja")
        name = str(shared_dir / "cases" / "data" / case / file)
        if not Path(name).exists():
            pytest.skip("the case is not beside this checkout")
        data = DataConfig(dataset_name=name, chat_template=template)
        dataset, _ = load_dataset_groups(data, tokenizer, split="train")
        return [tuple(map(tokenizer.decode, (group.prompt_ids, *group.response_ids))) for group in dataset]

    return read


def test_arguments_as_json_text(read):
    assert '"arguments": {"city": "Oslo"}}' in read("arguments-as-json-text", template="qwen2_5")[0][1]


@pytest.mark.parametrize("template", ["llama3_1", "qwen3", "cohere2"])
def test_content_parts(read, template):
    rows = read("content-parts", template=template)
    assert not any("'type'" in text for row in rows for text in row)
    assert "Where is the harbour?" in rows[0][0]
    assert "Red." in rows[1][1]


def test_conversations_as_json_text(read):
    assert read("conversations-as-json-text") == [("<|user|>Hi</s><|assistant|>", "a</s>", "b</s>")]


def test_empty_tools(read):
    assert not any("function" in text for text in read("empty-tools", template="llama3_1")[0])


@pytest.mark.parametrize("case", ["json-feature-parquet", "parquet-filler-nulls"])
def test_parquet_is_what_the_json_lines_are(read, case):
    assert read(case, "rows.parquet", "qwen2_5") == read(case, "rows.jsonl", "qwen2_5")


def test_parquet_crashes(read):
    with pytest.raises(UserError, match=r"row 0: column 'prompt' holds text that is not UTF-8"):
        read("parquet-crashes", "badutf8.parquet")
    assert [row[0] for row in read("parquet-crashes", "fardate.parquet")] == ["q", "r"]


def test_prompt_under_another_name(read):
    rows = read("prompt-under-another-name")
    assert rows[0][0] == "<|system|>You are a pirate.</s><|user|>Where is harbour 0?</s><|assistant|>"
    assert rows[4][0] == "<|user|>Name a colour.</s><|assistant|>"


def test_template_drops_content(read):
    with pytest.raises(UserError, match=r"row 0 .*chosen\[0\]\.content \(the reasoning\) is not in what"):
        read("template-drops-content", template="deepseek_r1_distill")
