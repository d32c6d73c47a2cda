"""Pairs that were judged more than once, by hand and by drawing votes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from engine.data.groups import PreferenceGroup
from engine.evaluate import evaluate
from engine.train.votes import judged_again, preference_shares, share_measures, share_table


def group(prompt, *responses):
    return PreferenceGroup(0, np.array(prompt, np.int32), tuple(np.array(ids, np.int32) for ids in responses))


def test_votes_on_a_pair_are_found_in_either_order():
    one = group([1, 2], [3], [4, 5])
    pairs = [
        (one, 0, 1),
        (group([1, 2], [4, 5], [3]), 0, 1),
        (one, 0, 1),
        # Other prompts and other cuts between the same tokens.
        (group([1], [3], [4, 5]), 0, 1),
        (group([1, 2], [3, 4], [5]), 0, 1),
        (group([1, 2], [9], [3], [4, 5]), 1, 2),
    ]
    places, first = judged_again(pairs)
    assert places.tolist() == [0, 0, 0, 1, 2, 0]
    assert first.tolist() == [True, False, True, True, True, True]


def test_shares_of_four_pairs_by_hand():
    # Pair 0: two votes of three for the side of margin 1. Pair 1: both votes against the side that the reward prefers.
    margins = np.array([1.0, 1.0, -1.0, -0.5, -0.5, 3.0])
    places, first = np.array([0, 0, 0, 1, 1, 2]), np.array([True, True, False, True, True, True])
    shares = preference_shares(margins, places, first)
    likely, unsure = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.5))
    np.testing.assert_allclose(shares, [[likely, 2 / 3, 3], [unsure, 0, 2]])
    errors = np.array([(likely - 2 / 3) ** 2 - (2 / 9) / 2, unsure**2])
    found = share_measures(shares)
    assert found["preference_share_error"] == pytest.approx(errors.mean())
    assert found["preference_share_error_se"] == pytest.approx(errors.std(ddof=1) / math.sqrt(2))
    assert found["num_repeated_pairs"] == 2.0
    assert share_table(shares)[1] == pytest.approx(
        {"from": 0.7, "to": 0.75, "pairs": 1, "votes": 3, "predicted": likely, "observed": 2 / 3}
    )
    assert share_measures(shares[:0]) == {}


def test_pairs_whose_reward_is_no_number_are_in_no_bin():
    """Infinite log-probs leave none; the error of all pairs is then none, too."""
    shares = preference_shares(np.array([math.nan, 1.0, 1.0, 1.0]), np.array([0, 0, 1, 1]), np.full(4, True))
    (row,) = share_table(shares)
    assert (row["from"], row["pairs"], row["observed"]) == (0.7, 1, 1)
    assert math.isnan(share_measures(shares)["preference_share_error"])
    assert share_table(shares[:1]) == []


def test_a_reward_that_knows_the_shares_has_no_error():
    """However few the votes are; one that is twice as sure has that of its probabilities."""
    generator = np.random.default_rng(0)
    truth = generator.normal(0, 1.5, 40_000)
    votes = generator.integers(2, 5, len(truth))
    places = np.repeat(np.arange(len(truth)), votes)
    first = generator.random(len(places)) < 1 / (1 + np.exp(-truth[places]))
    for scale in (1.0, 2.0):
        found = share_measures(preference_shares(np.where(first, 1, -1) * scale * truth[places], places, first))
        expected = ((1 / (1 + np.exp(-scale * truth)) - 1 / (1 + np.exp(-truth))) ** 2).mean()
        assert abs(found["preference_share_error"] - expected) < 4 * found["preference_share_error_se"]


def test_an_evaluation_has_them(make_config, tmp_path):
    rows = [{"prompt": f"Say {n}:", "chosen": " yes", "rejected": " no"} for n in range(3)]
    rows += [{"prompt": "Say 0:", "chosen": " no", "rejected": " yes"}, rows[1]]
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = evaluate(make_config(data={"eval_dataset_name": str(path), "eval_dataset_split": "train"}))
    # Under a policy that is the reference a half is predicted; of two pairs a half and one or zero are observed.
    assert values["eval_num_repeated_pairs"] == 2
    assert values["eval_preference_share_error"] == pytest.approx(((0 - 0.25) + 0.25) / 2, abs=1e-6)
