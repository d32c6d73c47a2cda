"""Numbers have the digits that mean something, and every metric has its words."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.report.tables import metric_rows, shown, shown_number, with_error
from engine.report.words import glossary, words_of
from engine.run_folder import SAMPLED
from engine.train.metrics import PREFERENCE_NAMES, TOKEN_NAMES


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.078193, "0.0782"),
        (3.446215, "3.446"),
        (-190.1234, "-190.1"),
        (23288.5, "23,288"),
        (3e-5, "3.000e-05"),
        (0.0, "0"),
        (float("inf"), "inf"),
        (None, "-"),
        (1234, "1,234"),
        (True, "True"),
    ],
)
def test_four_digits_mean_something(value, words):
    assert shown_number(value) == words


def test_counts_are_whole():
    assert (shown("num_pairs", 256.0), shown("count/chosen", 3.0), shown("loss", 3.0)) == ("256", "3", "3.000")


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-6.4492, 0.2532, "-6.45 ± 0.25"),
        (1234.56, 78.9, "1,235 ± 79"),
        (0.5, 0.00021, "0.5000 ± 0.0002"),
        (0.5, 0.0, "0.5000"),
        (0.5, None, "0.5000"),
        (None, 0.1, "-"),
    ],
)
def test_an_error_says_how_many_digits_a_value_has(value, error, words):
    assert with_error("x", value, error) == words.replace("± ", "±\u00a0")


def test_rows_of_sets_have_words_and_errors_beside_their_values():
    found = metric_rows(
        [
            {
                "eval_safety_rewards/accuracies": 0.75,
                "eval_safety_logps_change/chosen": -2.0,
                "eval_safety_logps_change/chosen_se": 0.5,
                "eval_as_trained/loss": 0.25,
                "eval_odd": 1.0,
            }
        ],
        "pairs",
    )
    assert [(row["name"], row["values"]) for row in found] == [
        ("safety_rewards/accuracies", ["0.7500"]),
        ("safety_logps_change/chosen", ["-2.00 ±\u00a00.50"]),
        ("as_trained/loss", ["0.2500"]),
        ("odd", ["1.000"]),
    ]
    assert found[0]["words"] == "share of pairs whose rewards are in the right order"
    assert found[2]["words"].startswith("before rounding: ")
    assert found[3]["words"] == ""


def test_every_metric_of_an_evaluation_has_words():
    lines = Path(__file__).parents[3].joinpath("docs", "evaluation.md").read_text().splitlines()
    defined = [line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")]
    assert f"{SAMPLED}kl" in defined
    for name in (*PREFERENCE_NAMES, *TOKEN_NAMES, "num_pairs", "aux_loss", *defined):
        assert words_of(name, "pairs"), name


def test_terms_are_those_of_the_loss():
    assert "reference" in dict(glossary("pairs", has_reference=True))
    assert "reference" not in str(glossary("rows", has_reference=False))
