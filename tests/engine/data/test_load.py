"""From a file on disk to a dataset and a report."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from engine.config.schema import DataConfig
from engine.data import load_dataset_groups, open_rows
from engine.errors import UserError


def test_pairs_file(pairs_jsonl, tiny_tokenizer):
    dataset, report = load_dataset_groups(DataConfig(dataset_name=str(pairs_jsonl)), tiny_tokenizer, split="train")
    assert (len(dataset), report.total, report.dropped, report.layout) == (24, 24, 0, "preference")
    rows = list(open_rows(DataConfig(dataset_name=str(pairs_jsonl)), split="train"))
    for group, row in zip(dataset, rows, strict=True):
        assert group.row == row.index
        decoded = [tiny_tokenizer.decode(np.concatenate([group.prompt_ids, ids])) for ids in group.response_ids]
        assert decoded == [row.data["prompt"] + row.data[name] + "</s>" for name in ("chosen", "rejected")]


def test_max_rows_and_rows_that_can_be_read_again(pairs_jsonl, tiny_tokenizer):
    data = DataConfig(dataset_name=str(pairs_jsonl), dataset_train_split="train[5:]", max_rows=3)
    dataset, report = load_dataset_groups(data, tiny_tokenizer, split="train")
    assert ([group.row for group in dataset], report.total) == ([5, 6, 7], 3)
    rows = open_rows(data, split="train")
    assert [row.index for row in rows] == [row.index for row in rows] == [5, 6, 7]


def test_evaluation_data(tmp_path, pairs_jsonl, tiny_tokenizer):
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 24))):
        lines = pairs_jsonl.read_text().splitlines()[part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    folder = DataConfig(dataset_name=str(tmp_path))
    assert len(load_dataset_groups(folder, tiny_tokenizer, split="eval")[0]) == 4
    other = DataConfig(dataset_name=str(tmp_path), eval_dataset_name=str(pairs_jsonl))
    assert len(load_dataset_groups(other, tiny_tokenizer, split="eval")[0]) == 24
    with pytest.raises(UserError, match=r"no evaluation data: .*is read whole.*set data\.eval_dataset_name"):
        load_dataset_groups(DataConfig(dataset_name=str(pairs_jsonl)), tiny_tokenizer, split="eval")


def test_dropped_rows_leave_gaps_in_row_numbers(tmp_path, tiny_tokenizer):
    good = "\n\nHuman: hi\n\nAssistant:"
    rows = [
        {"chosen": good + " a", "rejected": good + " b"},
        {"chosen": good + " a", "rejected": good.replace("hi", "ho") + " b"},
        {"chosen": good + " c", "rejected": good + " d"},
    ]
    path = tmp_path / "hh.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    dataset, report = load_dataset_groups(DataConfig(dataset_name=str(path)), tiny_tokenizer, split="train")
    assert [group.row for group in dataset] == [0, 2]
    assert (report.layout, report.counts, report.rows("differing_prompts")) == ("hh", {"differing_prompts": 1}, [1])
    with pytest.raises(UserError, match=r"differing_prompts in 1 of 3 rows \(row 1\)"):
        load_dataset_groups(DataConfig(dataset_name=str(path), strict=True), tiny_tokenizer, split="train")
    as_text = DataConfig(dataset_name=str(path), format="preference")
    dataset, report = load_dataset_groups(as_text, tiny_tokenizer, split="train")
    assert (len(dataset), report.layout) == (3, "preference")


def test_no_row_left(pairs_jsonl, tiny_tokenizer):
    with pytest.raises(UserError, match="none of 24 rows can be used"):
        load_dataset_groups(DataConfig(dataset_name=str(pairs_jsonl), max_length=2), tiny_tokenizer, split="train")
    empty = DataConfig(dataset_name=str(pairs_jsonl), dataset_train_split="train[30:]")
    with pytest.raises(UserError, match="the split has no rows"):
        load_dataset_groups(empty, tiny_tokenizer, split="train")


def test_broken_line_is_named(tmp_path, pairs_jsonl, tiny_tokenizer):
    lines = pairs_jsonl.read_text().splitlines()
    lines[11] = lines[11][:-5]
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"broken\.jsonl, line 12, column \d+: broken JSON"):
        load_dataset_groups(DataConfig(dataset_name=str(path)), tiny_tokenizer, split="train")


@pytest.fixture(scope="module")
def chat_tokenizer(shared_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_dir / "models" / "tiny-chat-llama")


@pytest.mark.parametrize("chat_template", ["auto", "none"])
def test_hh_rows_that_share_a_prompt(shared_dir, chat_tokenizer, chat_template):
    path = shared_dir / "data" / "hh-harmless-test.jsonl.gz"
    data = DataConfig(dataset_name=str(path), chat_template=chat_template)
    dataset, report = load_dataset_groups(data, chat_tokenizer, split="train")
    assert (report.total, len(dataset), report.kept) == (2312, 2307, 2307)
    assert report.rows("differing_prompts") == [1254, 1688, 1950, 1952, 2036]
    assert report.rows("empty_completion") == [86, 516, 925, 1103]
    # Real answers that begin with " Human:".
    assert len(report.rows("odd_roles")) == 27
    assert set(report.counts) == {"differing_prompts", "empty_completion", "truncated", "eos_lost", "odd_roles"}
    sizes = np.stack(dataset.lengths)
    assert (sizes[:, :1] + sizes[:, 1:]).max() <= 1024


def test_sharegpt_rows(shared_dir, chat_tokenizer):
    data = DataConfig(dataset_name=str(shared_dir / "data" / "dpo-en-demo.json"), max_length=None)
    dataset, report = load_dataset_groups(data, chat_tokenizer, split="train")
    assert (report.layout, report.total, len(dataset)) == ("sharegpt", 300, 300)
    row = next(iter(open_rows(data, split="train"))).data
    text = chat_tokenizer.decode(np.concatenate([dataset[0].prompt_ids, dataset[0].response_ids[1]]))
    assert text == f"<|user|>{row['conversations'][0]['value']}</s><|assistant|>{row['rejected']['value']}</s>"
    assert "missing_eos" not in report.counts
    assert "double_bos" not in report.counts
