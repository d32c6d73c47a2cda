"""Unpaired rows: the ids that TRL gives, labels, pairs that become rows, and what lint says of a whole set."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from engine.config.schema import DataConfig
from engine.data import load_dataset_groups
from engine.data.columns import detect_format
from engine.data.foreign import FOREIGN
from engine.data.groups import PreferenceDataset
from engine.data.sources import Row
from engine.errors import RowError, UserError
from tests.engine.conftest import preference_rows
from tests.engine.data.layout_rows import ASK, BAD, GOOD, PAIR, SIDES, UNPAIRED, reply, user
from tests.engine.data.test_layouts import TEMPLATE


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(*rows, max_length=None, unpair=True, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(dataset_name=str(path), max_length=max_length, **data)
        return load_dataset_groups(config, tokenizer, split="train", unpair=unpair)

    return load


def found(dataset):
    return [(g.prompt_ids.tolist(), *(r.tolist() for r in g.response_ids), g.desirable) for g in dataset]


def trl_rows(rows, tokenizer, max_length=None):
    """(prompt ids, completion ids, label) of TRL's preparation and truncation for KTO."""
    datasets = pytest.importorskip("datasets")
    kto = pytest.importorskip("trl.trainer.kto_trainer")
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    prepared = kto.KTOTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(rows), tokenizer, arguments, "held-out"
    )
    ends = [None if max_length is None else max_length - len(row["prompt_ids"]) for row in prepared]
    return [
        (r["prompt_ids"], r["completion_ids"][:end], bool(r["label"])) for r, end in zip(prepared, ends, strict=True)
    ]


@pytest.mark.parametrize("name", UNPAIRED)
def test_a_layout_gives_the_ids_of_trl_for_the_same_row(load, tokenizer, name):
    layout, row, same = UNPAIRED[name]
    dataset, report = load(row)
    assert (report.layout, found(dataset)) == (layout, trl_rows([same], tokenizer))
    assert found(load(row, format=layout)[0]) == found(dataset)


@pytest.mark.parametrize("max_length", [None, 24])
def test_pairs_become_rows_in_the_order_of_trl(load, tokenizer, max_length, monkeypatch):
    rows = [*preference_rows(7)]
    expected = trl_rows(rows, tokenizer, max_length)
    assert found(load(*rows, max_length=max_length)[0]) == expected
    assert {label for *_, label in expected} == {True, False}
    monkeypatch.setattr("engine.data.unpaired.ROWS_AT_ONCE", 3)
    by_threes, _ = load(*rows, max_length=max_length)
    if max_length is None:
        assert [g.desirable for g in by_threes][:12] == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    assert sorted(found(by_threes)) == sorted(expected)


def test_a_pair_gives_both_of_its_rows_what_it_has(load):
    numbers = {"weight": 2.0, "chosen_mask": [1, 0, 1], "rejected_mask": [1, 1], "ref_chosen_logps": -1.0}
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [9, 2]}
    good, bad = load(ids | numbers | {"ref_rejected_logps": -2.0})[0]
    assert [(g.weight, g.ref_logps, g.row) for g in (good, bad)] == [(2.0, (-1.0,), 0), (2.0, (-2.0,), 0)]
    assert [[w.tolist() for w in g.token_weights] for g in (good, bad)] == [[[1, 0, 1]], [[1, 1]]]
    # More than two responses stay as they are, for the loss to refuse.
    ranking = {"prompt": "a", "responses": [" b", " c", " d"], "ranking": [1, 2, 3]}
    (group,) = load(ranking)[0]
    assert (len(group.response_ids), group.desirable) == (3, None)


def test_what_was_cut_off_is_kept_up_to_the_longest_that_fits_anywhere(load):
    long = {"prompt_ids": [5] * 6, "chosen_ids": [*range(10, 30), 2], "rejected_ids": [9, 2]}
    good, bad = load(long, max_length=10)[0]
    assert good.response_ids[0].tolist() == [10, 11, 12, 13]
    assert [part.tolist() for part in good.cut] == [[14, 15, 16, 17, 18]]
    assert bad.cut is None
    assert load(long, max_length=10, unpair=False)[0][0].cut is None
    assert load(long)[0][0].cut is None


def test_the_digest_knows_the_labels(load):
    rows = [{"prompt": "a b", "completion": " c", "label": label} for label in (True, False)]
    first, other = (load(*order)[0].digest for order in (rows, rows[::-1]))
    assert first != other
    groups = load(*rows)[0]
    assert groups.labelled_G.tolist() == [True, True]
    assert groups.desirable_G.tolist() == [True, False]
    assert not PreferenceDataset(load(PAIR, unpair=False)[0]).labelled_G.any()


def test_a_set_with_one_label_is_counted(load):
    rows = [{"prompt": f"a {i}?", "completion": f" c {i}", "label": False} for i in range(3)]
    assert load(*rows)[1].counts == {"one_label": 3}
    assert load(*rows[:1])[1].counts == {}
    with pytest.raises(UserError, match=r"one_label in 3 of 3 rows \(rows 0, 1, 2\): .*; add rows with the other"):
        load(*rows, strict=True)


def test_columns_of_any_name(load, tokenizer):
    row = {"ask": ASK, "said": GOOD, "liked": "yes"}
    names = {"prompt": "ask", "completion": "said", "label": "liked"}
    with pytest.raises(UserError, match=r"'label' must be true .* or false, got 'yes'; correct the row"):
        load(row, columns=names)
    same = {"prompt": [user(ASK)], "completion": [reply(GOOD)], "label": True}
    assert found(load(row | {"liked": True}, columns=names)[0]) == trl_rows([same], tokenizer)


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": ASK, "completion": GOOD, "label": True, **SIDES}, "preference"),
        ({"prompt": ASK, "response": GOOD, "label": 1, **SIDES}, "preference"),
        ({"messages": [user(ASK), reply(GOOD)], "rejected_response": BAD, "label": 1}, "ms_swift"),
        ({"messages": [user(ASK)], "label": 1, **SIDES}, "messages"),
        ({"prompt": ASK, "responses": [GOOD, BAD], "scores": [2, 1], "label": 1, "response": "x"}, "scored"),
        ({"instruction": ASK, "output": [GOOD, BAD], "label": 1}, "llama_factory"),
    ],
)
def test_rows_of_pairs_stay_pairs_beside_a_label(row, layout):
    assert detect_format(Row(0, row, "rows.jsonl")) == layout


def test_one_answer_without_a_label_is_told_of_one():
    with pytest.raises(RowError, match="here completion, are no preference pairs; with a column label, true or false"):
        detect_format(Row(0, {"prompt": ASK, "completion": GOOD}, "rows.jsonl"))
    row = Row(0, {"messages": [user(ASK)], "label": True}, "rows.jsonl")
    layout = next(variant for variant in FOREIGN["labelled"] if variant.known_by(row.data))
    with pytest.raises(RowError, match="'messages' must end with the answer that has the label"):
        layout.standard(row)
