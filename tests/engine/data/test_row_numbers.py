"""Weights, margins and masks of rows: read, checked by row, and where they end up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from engine.config.schema import DataConfig
from engine.data import load_dataset_groups
from engine.data.groups import PreferenceDataset
from engine.data.read import stream_set
from engine.data.row_numbers import NumberSummary
from engine.data.sets import sets_of
from engine.errors import UserError

PAIR = {"prompt": "Say it:", "chosen": " **Yes**, it is.", "rejected": " no"}


def load(folder: Path, rows: list[dict], tokenizer, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset_groups(DataConfig(dataset_name=str(path), **options), tokenizer, split="train")


def sizes(folder: Path, tokenizer, row: dict = PAIR) -> list[int]:
    return [len(ids) for ids in load(folder, [row], tokenizer)[0][0].response_ids]


def test_numbers_of_a_row_travel_with_it(tmp_path, plain_tokenizer):
    first, second = sizes(tmp_path, plain_tokenizer)
    mask = [[1] * first, [True] * (second - 1) + [False]]
    weights = [[0.5] * first, [2.0] * second]
    rows = [PAIR, {**PAIR, "weight": 2, "margin": -0.5, "mask": mask, "weights": weights}, {**PAIR, "weight": None}]
    data, _ = load(tmp_path, rows, plain_tokenizer)
    assert [g.weight for g in data] == [1, 2, 1]
    assert [g.margin for g in data] == [0, -0.5, 0]
    assert [w.tolist() for w in data[0].token_weights] == [[1.0] * first, [1.0] * second]
    assert [w.tolist() for w in data[1].token_weights] == [[0.5] * first, [2.0] * (second - 1) + [0.0]]
    assert data.counted[1].tolist() == [*data.lengths[1][:2], second - 1]
    assert data[1].whole.token_weights is None
    plain, _ = load(tmp_path, [PAIR] * 3, plain_tokenizer)
    assert not plain.has_numbers
    assert plain.counted is plain.lengths
    assert plain.digest != data.digest
    assert NumberSummary(plain).words() == ""
    share = f"{1 / (3 * (first + second)):.1%} of completion tokens left out"
    assert NumberSummary(data).words() == f"weight 1 to 2; margin -0.5 to 0; {share}; tokens have weights"


def test_each_number_changes_the_digest(tmp_path, plain_tokenizer):
    first, second = sizes(tmp_path, plain_tokenizer)
    given = [{}, {"weight": 2}, {"margin": 2}, {"weights": [[1] * first, [2] * second]}]
    assert len({load(tmp_path, [PAIR | numbers], plain_tokenizer)[0].digest for numbers in given}) == 4


def test_sides_have_columns_of_their_own_under_any_name(tmp_path, plain_tokenizer):
    first, second = sizes(tmp_path, plain_tokenizer)
    row = {**PAIR, "keep_w": [0, *[1] * (first - 1)], "keep_l": [1] * second, "importance": "1.5"}
    columns = {"chosen_mask": "keep_w", "rejected_mask": "keep_l", "weight": "importance"}
    data, _ = load(tmp_path, [row], plain_tokenizer, columns=columns, format="preference")
    assert data[0].token_weights[0].tolist() == [0.0, *[1.0] * (first - 1)]
    assert data[0].weight == 1.5
    left_out, _ = load(tmp_path, [{**PAIR, "weight": 3, "margin": 1}], plain_tokenizer, columns={"weight": None})
    assert (left_out[0].weight, left_out[0].margin) == (1, 1)


@pytest.mark.parametrize("layout", ["kwise", "scored", "pku_saferlhf", "tokenized", "sharegpt"])
def test_masks_follow_their_responses(layout, tmp_path, tiny_tokenizer):
    """They are in the order of the row, and the best response comes first."""
    worse, better = " no", " yes, of course it is"
    ids = {name: tiny_tokenizer(text)["input_ids"] for name, text in (("worse", worse), ("better", better))}
    row = {
        "kwise": {"prompt": "Is it?", "responses": [worse, better], "ranking": [2, 1]},
        "scored": {"prompt": "Is it?", "responses": [worse, better], "scores": [1, 5]},
        "pku_saferlhf": {"prompt": "?", "response_0": worse, "response_1": better, "better_response_id": 1},
        "tokenized": {"prompt_ids": [9], "chosen_ids": ids["better"], "rejected_ids": ids["worse"]},
        "sharegpt": {"conversations": [{"from": "human", "value": "?"}], "chosen": better, "rejected": worse},
    }[layout]
    plain = load(tmp_path, [row], tiny_tokenizer)[0][0]
    best_first = layout in ("tokenized", "sharegpt")
    lengths = [len(r) for r in plain.response_ids]
    assert lengths[0] > lengths[1]
    masks = [[0, *[1] * (size - 1)] if i == 0 else [*[1] * (size - 1), 0] for i, size in enumerate(lengths)]
    given = masks if best_first else masks[::-1]
    group = load(tmp_path, [{**row, "mask": given}], tiny_tokenizer)[0][0]
    assert [w.tolist() for w in group.token_weights] == masks
    # Columns of sides say themselves which is meant, beside a column in the order of the row, too.
    ones = [[1] * size for size in lengths]
    sides = {"chosen_mask": masks[0], "rejected_mask": masks[1], "weights": ones if best_first else ones[::-1]}
    group = load(tmp_path, [{**row, **sides}], tiny_tokenizer)[0][0]
    assert [w.tolist() for w in group.token_weights] == masks


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"weight": -1}, "column 'weight' must not be negative, got -1"),
        ({"weight": math.nan}, "column 'weight' must be a finite number, got nan"),
        ({"weight": "heavy"}, "column 'weight' must be a finite number, got 'heavy'"),
        ({"margin": math.inf}, "column 'margin' must be a finite number, got inf"),
        ({"margin": True}, "column 'margin' must be a finite number, got True"),
        ({"mask": [1, 1]}, "column 'mask' must hold 2 lists, one for each response"),
        ({"mask": [[1], [1], [1]]}, "column 'mask' must hold 2 lists, one for each response"),
        ({"mask": [[1, 0.5], [1]]}, "column 'mask' must be 0 or 1, got 0.5"),
        ({"weights": [[1], [-0.5]]}, "column 'weights' must be finite numbers, 0 or more, got -0.5"),
        ({"weights": [[1], [math.nan]]}, "must be finite numbers, 0 or more, got nan"),
        ({"weights": [[1], ["1"]]}, "must be finite numbers, 0 or more, got '1'"),
        ({"chosen_mask": [1]}, "column 'chosen_mask and rejected_mask' must hold 2 lists"),
        ({"mask": [[1], [1]], "chosen_mask": [1], "rejected_mask": [1]}, "column 'mask' stands beside chosen_mask and"),
        ({"mask": [[1], [1]], "weights": [[1, 1], [1]]}, "column 'mask' is not as long as column 'weights'"),
        ({"mask": [[1], [1]]}, "mask or weights of the chosen completion have 1 number, and with this tokenizer it"),
    ],
)  # fmt: skip
def test_wrong_numbers_are_errors_by_row(numbers, words, tmp_path, plain_tokenizer):
    with pytest.raises(UserError, match=r"rows.jsonl, row 1 \(line 2\): ") as caught:
        load(tmp_path, [PAIR, PAIR | numbers], plain_tokenizer)
    assert words in str(caught.value)
    data = DataConfig(dataset_name=str(tmp_path / "rows.jsonl"))
    groups, report = stream_set(sets_of(data, "train")[0], plain_tokenizer, tolerant=True)
    assert [group.row for group in groups] == [0]
    assert report.rows("bad_weight") == [1]
    assert words in report.format()


def test_a_completion_without_a_token_that_counts_is_dropped(tmp_path, plain_tokenizer):
    first, second = sizes(tmp_path, plain_tokenizer)
    masks = [[1] * first, [0] * second]
    data, report = load(tmp_path, [PAIR, {**PAIR, "prompt": "?", "mask": masks}], plain_tokenizer)
    assert (len(data), report.rows("nothing_counts"), report.dropped) == (1, [1], 1)


def test_numbers_are_cut_with_their_tokens(tmp_path, plain_tokenizer):
    first, second = sizes(tmp_path, plain_tokenizer)
    prompt = len(load(tmp_path, [PAIR], plain_tokenizer)[0][0].prompt_ids)
    weights = [list(range(1, first + 1)), list(range(1, second + 1))]
    data, _ = load(tmp_path, [{**PAIR, "weights": weights}], plain_tokenizer, max_length=prompt + 3)
    assert [w.tolist() for w in data[0].token_weights] == [[1, 2, 3], [1, 2, 3][:second]]


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_pattern_leaves_out_the_tokens_that_it_touches(kind, tmp_path, plain_tokenizer, tiny_tokenizer):
    """The prompt and its asterisks are not the completion's; a token that the match begins or ends inside is out."""
    row = {**PAIR, "prompt": "**Say** it:"}
    if kind == "messages":
        turns = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        row = {"prompt": [{"role": "user", "content": row["prompt"]}], **turns}
    tokenizer = plain_tokenizer if kind == "text" else tiny_tokenizer
    data, _ = load(tmp_path, [row], tokenizer, mask_pattern=r"\*\*|</s>")
    for ids, weights in zip(data[0].response_ids, data[0].token_weights, strict=True):
        texts = [tokenizer.decode([i]) for i in ids]
        assert weights.tolist() == [0.0 if "*" in text or text == "</s>" else 1.0 for text in texts]
    assert [w[-1] for w in data[0].token_weights] == [0.0, 0.0]
    assert (data[0].token_weights[0] == 0).sum() > 2
    # A part of a token, and a character of several tokens.
    letters, _ = load(
        tmp_path, [{**PAIR, "chosen": " Yes, \N{SNOWMAN} it is"}], plain_tokenizer, mask_pattern="\N{SNOWMAN}|i(?=s)"
    )
    ids, weights = letters[0].response_ids[0], letters[0].token_weights[0]
    snowman = plain_tokenizer("\N{SNOWMAN}", add_special_tokens=False)["input_ids"]
    out = [int(i) for i, w in zip(ids, weights, strict=True) if w == 0]
    assert len(snowman) > 1
    assert out[: len(snowman)] == snowman
    assert "i" in plain_tokenizer.decode(out[len(snowman) :])


def test_a_pattern_beside_a_mask(tmp_path, plain_tokenizer):
    first, second = sizes(tmp_path, plain_tokenizer)
    weights = [[2] * first, [3] * second]
    data, _ = load(tmp_path, [{**PAIR, "weights": weights}], plain_tokenizer, mask_pattern=r"\*")
    assert set(data[0].token_weights[0].tolist()) == {0.0, 2.0}
    assert set(data[0].token_weights[1].tolist()) == {3.0}


def test_what_a_pattern_needs(tmp_path, plain_tokenizer):
    with pytest.raises(ValueError, match=r"data.mask_pattern is no regular expression: .*, got '\(\?'"):
        DataConfig(dataset_name="d", mask_pattern="(?")
    row = {"prompt_ids": [9], "chosen_ids": [10, 11], "rejected_ids": [12]}
    with pytest.raises(UserError, match=r"row 0 \(line 1\): data.mask_pattern is for text, and the row is a list of"):
        load(tmp_path, [row], plain_tokenizer, mask_pattern="a")

    class Slow(type(plain_tokenizer)):
        is_fast = False

    slow = Slow(tokenizer_object=plain_tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(
        UserError, match=r"data.mask_pattern needs to know where tokens are in the text, which Slow does"
    ):
        load(tmp_path, [PAIR], slow, mask_pattern="a")

    class Lost(type(plain_tokenizer)):
        def __call__(self, *args, **kwargs):
            made = super().__call__(*args, **kwargs)
            made["offset_mapping"] = [[(0, 0)] * len(spans) for spans in made["offset_mapping"]]
            return made

    lost = Lost(tokenizer_object=plain_tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(UserError, match=r"data.mask_pattern matches '\*\*', and the tokenizer names no token there"):
        load(tmp_path, [PAIR], lost, mask_pattern=r"\*\*")


def test_groups_with_and_without_weights_share_a_dataset(tmp_path, plain_tokenizer):
    """Weights that come late do not move those before them."""
    first, second = sizes(tmp_path, plain_tokenizer)
    weighted, _ = load(tmp_path, [{**PAIR, "weights": [[2] * first, [3] * second]}], plain_tokenizer)
    plain, _ = load(tmp_path, [PAIR], plain_tokenizer)
    data = PreferenceDataset([plain[0], weighted[0], plain[0]])
    assert [[set(w.tolist()) for w in g.token_weights] for g in data] == [
        [{1.0}, {1.0}],
        [{2.0}, {3.0}],
        [{1.0}, {1.0}],
    ]
    assert data.has_fractions
    assert not PreferenceDataset([plain[0]]).has_fractions
    np.testing.assert_array_equal(data.counted.sizes_P, data.lengths.sizes_P)
