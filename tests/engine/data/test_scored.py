"""Scored completions: the layouts, the pairs, what lint says of ties."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.config.schema import DataConfig
from engine.data import load_dataset_groups
from engine.errors import UserError

TEXTS = [" a first answer", " a second one", " third", " the fourth answer"]
SCORES = [2.0, 5.0, 2.0, 4.5]
"""Best first: 1, 3, then 0 and 2, which are equal."""


def parallel(**names):
    row = {"prompt": "What?", "responses": TEXTS, "scores": SCORES}
    return {names.get(key, key): value for key, value in row.items()}


def objects(text="response", score="overall_score"):
    items = [{text: t, score: s, "annotations": {}} for t, s in zip(TEXTS, SCORES, strict=True)]
    return {"instruction": "What?", "completions": items, "models": []}


LAYOUTS = {
    "parallel lists": parallel(),
    "other names": parallel(prompt="instruction", responses="generations", scores="ratings"),
    "ultrafeedback": objects(),
    "text and score": objects("text", "score"),
    "strings and scores": parallel(responses="completions"),
}


@pytest.fixture
def load(tmp_path, plain_tokenizer):
    def run(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_dataset_groups(DataConfig(dataset_name=str(path), **options), plain_tokenizer, split="train")

    return run


def texts(group, tokenizer) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in group.response_ids]


@pytest.mark.parametrize("form", ["score_{}", "{}_score", "rating_{}", "{}-rating", "{}_reward"])
def test_scores_beside_a_pair_that_say_the_opposite_are_counted(form, load):
    pairs = [(2, 1), (1, 1.0), (1, "2.5"), (None, 2), (1, "good")]
    rows = [
        {
            "prompt": f"Why {i}?",
            "chosen": " Yes.",
            "rejected": " No.",
            form.format("chosen"): a,
            form.format("rejected"): b,
        }
        for i, (a, b) in enumerate(pairs)
    ]
    dataset, report = load(rows)
    assert (len(dataset), report.counts, report.rows("scores_reversed")) == (5, {"scores_reversed": 1}, [2])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_group(name, load, plain_tokenizer):
    dataset, report = load([LAYOUTS[name]])
    assert report.layout == "scored"
    assert texts(dataset[0], plain_tokenizer) == [TEXTS[i] for i in (1, 3, 0, 2)]
    assert dataset[0].pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))
    assert report.counts == {"tied_scores": 1}
    assert dataset.terms.tolist() == [5]


def test_messages_are_rendered(load, tmp_path, tiny_tokenizer):
    turns = [{"role": "assistant", "content": text} for text in TEXTS]
    path = tmp_path / "chat.jsonl"
    row = {"prompt": [{"role": "user", "content": "What?"}], "responses": [[turn] for turn in turns], "scores": SCORES}
    path.write_text(json.dumps(row) + "\n")
    dataset, _ = load_dataset_groups(DataConfig(dataset_name=str(path)), tiny_tokenizer, split="train")
    assert texts(dataset[0], tiny_tokenizer) == [TEXTS[i] for i in (1, 3, 0, 2)]
    assert "<|assistant|>" in tiny_tokenizer.decode(dataset[0].prompt_ids)


@pytest.mark.parametrize(
    ("options", "kept", "pairs", "problem"),
    [
        ({"scored_pairs": "best_vs_rest"}, (1, 3, 0, 2), ((0, 1), (0, 2), (0, 3)), None),
        ({"scored_pairs": "best_worst"}, (1, 2), None, None),
        ({"min_score_gap": 1.0}, (1, 3, 0, 2), ((0, 2), (0, 3), (1, 2), (1, 3)), "tied_scores"),
        ({"scored_pairs": "best_vs_rest", "min_score_gap": 1.0}, (1, 0, 2), ((0, 1), (0, 2)), "tied_scores"),
        ({"min_score_gap": 3.0, "scored_pairs": "best_worst"}, (1, 2), None, None),
    ],
)
def test_the_pairs_that_are_asked_for(options, kept, pairs, problem, load, plain_tokenizer):
    dataset, report = load([parallel()], **options)
    assert texts(dataset[0], plain_tokenizer) == [TEXTS[i] for i in kept]
    assert dataset[0].pairs == pairs
    assert list(report.counts) == ([problem] if problem else [])


def test_a_ranking_needs_different_scores(load):
    different = parallel() | {"scores": [1, 4, 2, 3]}
    dataset, report = load([different, parallel()], scored_pairs="ranking")
    assert len(dataset) == 1
    assert dataset[0].pairs is None
    assert len(dataset[0].response_ids) == 4
    assert report.counts == {"tied_ranking": 1}
    assert report.rows("tied_ranking") == [1]


def test_rows_without_a_pair_are_dropped_and_counted(load):
    flat = parallel() | {"scores": [3, 3, 3, 3]}
    dataset, report = load([flat, parallel(), flat])
    assert [group.row for group in dataset] == [1]
    assert report.counts == {"no_scored_pair": 2, "tied_scores": 1}
    assert report.dropped == 2
    with pytest.raises(UserError, match=r"none of 1 rows can be used \(no_scored_pair 1\); lower data\.min_score_gap"):
        load([flat])
    with pytest.raises(UserError, match=r"no_scored_pair in 1 of 2 rows"):
        load([flat, parallel()], strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1, 2]}, r"'scores' needs one score for each of 4 responses"),
        ({"scores": [1, 2, "x", 4]}, "scores must be finite numbers"),
        ({"responses": [" one"], "scores": [1]}, "'responses' needs 2 responses or more, got 1"),
        ({"prompt": None}, "no known layout"),
    ],
)
def test_faults_are_named(change, message, load):
    with pytest.raises(UserError, match=message):
        load([parallel() | change])


def test_a_completion_without_score_or_text_is_named(load):
    row = objects()
    del row["completions"][2]["overall_score"]
    with pytest.raises(UserError, match=r"a completion has no score: one of score, overall_score"):
        load([row])
    row = objects("words")
    with pytest.raises(UserError, match=r"a completion has no text: one of response, completion"):
        load([row])


def test_a_dataset_keeps_the_pairs_of_its_groups(load):
    flat, two = parallel() | {"scores": [1, 2, 3, 4]}, parallel() | {"responses": TEXTS[:2], "scores": [1, 2]}
    dataset, _ = load([parallel(), two, flat])
    assert dataset.terms.tolist() == [5, 1, 6]
    assert dataset.has_pairs.tolist() == [True, False, True]
    assert dataset[1].pairs is None
    assert dataset[2].pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert all(isinstance(ids, np.ndarray) for ids in dataset[2].response_ids)
