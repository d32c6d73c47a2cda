"""The synthetic language favours neither style, and held-out questions are new."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter

import pytest

from engine.demo.corpus import (
    CLOSINGS,
    CORES,
    NAMES,
    OPENINGS,
    STYLES,
    WORLD,
    all_subjects,
    dialogues,
    preference_pairs,
    split_subjects,
    style_of,
)


def words_per_sentence(text):
    return [len(sentence.split()) for sentence in re.findall(r"[^.!?]+[.!?]", text)]


def core_of(answer):
    """The fact of an answer, without the phrases around it."""
    style = style_of(answer)
    opening = next(phrase for phrase in OPENINGS[style] if answer.startswith(phrase))
    closing = next(phrase for phrase in CLOSINGS[style] if answer.endswith(phrase))
    return answer[len(opening) : len(answer) - len(closing)].strip()


@pytest.mark.parametrize("phrases", [OPENINGS, CLOSINGS])
def test_phrases_are_twins(phrases):
    assert len(phrases["kind"]) == len(phrases["curt"])
    for kind, curt in zip(phrases["kind"], phrases["curt"], strict=True):
        assert words_per_sentence(kind) == words_per_sentence(curt)
        assert kind.count(",") == curt.count(",")
    assert not set(phrases["kind"]) & set(phrases["curt"])


def test_no_phrase_starts_another():
    phrases = [phrase for style in STYLES for phrase in OPENINGS[style]]
    assert all(a == b or not a.startswith(b) for a in phrases for b in phrases)


def test_pre_training_reads_both_styles_equally_often():
    texts = list(dialogues(400, seed=3))
    assert Counter(style_of(answer["content"]) for _, answer in texts) == {"kind": 200, "curt": 200}
    assert [turn["role"] for turn in texts[0]] == ["user", "assistant"]


def test_lengths_do_not_tell_the_styles_apart():
    pairs = preference_pairs(1500, split_subjects(0)[0], 0, "train")
    kind = [len(pair.chosen.split()) for pair in pairs]
    curt = [len(pair.rejected.split()) for pair in pairs]
    spread = statistics.pstdev(kind + curt)
    # Four standard errors of the difference of two means.
    assert abs(statistics.mean(kind) - statistics.mean(curt)) < 4 * spread * math.sqrt(2 / len(pairs))
    assert spread > 3


def test_both_answers_of_a_pair_state_the_same_fact():
    for pair in preference_pairs(300, all_subjects(), 1, "any"):
        assert style_of(pair.chosen) == "kind"
        assert style_of(pair.rejected) == "curt"
        assert core_of(pair.chosen) == core_of(pair.rejected)


def test_held_out_questions_are_new():
    learned, unseen = split_subjects(5)
    assert not set(learned) & set(unseen)
    assert sorted(learned + unseen) == sorted(all_subjects())
    train = preference_pairs(600, learned, 5, "train")
    held_out = preference_pairs(200, unseen, 5, "held-out")
    assert len({pair.prompt for pair in train + held_out}) == 800
    assert not {core_of(p.chosen) for p in train if "It " not in p.chosen} & {core_of(p.chosen) for p in held_out}


def test_everything_follows_from_the_seed():
    subjects, _ = split_subjects(9)
    assert split_subjects(9)[0] == subjects
    assert preference_pairs(50, subjects, 9, "train") == preference_pairs(50, subjects, 9, "train")
    assert preference_pairs(50, subjects, 9, "train") != preference_pairs(50, subjects, 10, "train")
    assert list(dialogues(50, 9)) == list(dialogues(50, 9))


def test_every_animal_has_a_fact_on_every_topic():
    assert all(len(facts) == len(CORES) for facts in WORLD.values())
    assert len(all_subjects()) == len(WORLD) * len(CORES)
    assert len(set(NAMES)) == len(NAMES)


def test_a_pair_is_a_row_of_messages():
    (pair,) = preference_pairs(1, all_subjects(), 0, "one")
    row = pair.row()
    assert row["prompt"] == [{"role": "user", "content": pair.prompt}]
    assert row["chosen"] == [{"role": "assistant", "content": pair.chosen}]
    assert row["rejected"] == [{"role": "assistant", "content": pair.rejected}]
