"""Figures of held-out pairs against closed forms and cases worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.run_folder import SAMPLED
from engine.train.divergence import divergence
from engine.train.measures import (
    by_reference_margin,
    calibration,
    calibration_error,
    calibration_terms,
    correlation,
    correlation_terms,
    format_details,
    idealized,
    mean_and_error,
    measures,
    most_displaced,
    of_pairs,
)
from engine.train.votes import share_measures

POLICY = [(-10.0, -12.0), (-30.0, -20.0), (-8.0, -9.0), (-40.0, -41.0)]
REFERENCE = [(-11.0, -10.0), (-25.0, -21.0), (-9.0, -9.5), (-20.0, -30.0)]
LENGTHS = [(2, 4), (10, 5), (3, 3), (8, 9)]
"""Log-probs and tokens of (chosen, rejected): of four pairs the policy ranks three right, the reference two."""


def pairs(reference=REFERENCE):
    flat = [None if v is None else torch.tensor(v).flatten() for v in (POLICY, reference, LENGTHS)]
    return of_pairs(*flat, np.arange(8).reshape(-1, 2))


def rewards(beta: float) -> np.ndarray:
    change = np.asarray(POLICY) - np.asarray(REFERENCE)
    return beta * (change[:, 0] - change[:, 1])


def test_rankings_and_displacement_of_four_pairs():
    values = measures(pairs(), rewards(0.1), beta=0.1)
    assert values["reference_ranking_accuracy"] == 0.5
    # -11/2 < -10/4, -25/10 > -21/5, -9/3 > -9.5/3, -20/8 > -30/9
    assert values["reference_ranking_accuracy_per_token"] == 0.75
    assert (values["rankings_gained"], values["rankings_lost"]) == (0.25, 0.0)
    changes = np.array([1.0, -5.0, 1.0, -20.0])
    assert values["logps_change/chosen"] == changes.mean()
    assert values["logps_change/chosen_se"] == pytest.approx(changes.std(ddof=1) / 2)
    assert values["logps_change/rejected"] == np.mean([-2.0, 1.0, 0.5, -11.0])
    assert values["chosen_fell"] == 0.5
    assert most_displaced(pairs()) == [3, 1]
    # The margins are 0.1 * (3, -6, 0.5, -9); the chosen response is the longer one in the second pair alone.
    assert values["rewards/accuracies_chosen_longer"] == 0.0
    assert values["rewards/accuracies_chosen_shorter"] == 0.5
    assert values["length_bias"] == pytest.approx(np.corrcoef(rewards(0.1), [-2, 5, 0, -1])[0, 1])


def test_without_a_reference_nothing_is_compared_with_one():
    values = measures(pairs(None), rewards(0.1), beta=0.1)
    assert not [name for name in values if "reference" in name or "logps" in name or "idealized" in name]
    assert "calibration_error" in values


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("smoothing", [0.01, 0.3, 0.49])
def test_the_idealized_ranking_is_that_of_the_policy_that_minimises_the_loss(beta, smoothing):
    """The loss of a pair is minimised over its log-ratio by search, label smoothing being the share of wrong labels."""
    gaps = np.array([-60.0, -9.0, -3.0, -0.5, 0.5, 4.0])
    log_ratio = torch.linspace(-200, 200, 400_001, dtype=torch.float64)
    log_sigmoid = torch.nn.functional.logsigmoid
    found = []
    for gap in gaps:
        margin = beta * (log_ratio - gap)
        loss = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
        found.append(bool(log_ratio[loss.argmin()] > 0))
    assert idealized(gaps, beta, smoothing).tolist() == found
    assert idealized(gaps, beta, 0.0).all()


def test_calibration_of_a_reward_whose_labels_are_drawn_from_it():
    """Bradley-Terry labels: the error goes to zero. Rewards twice as large are too sure."""
    generator = np.random.default_rng(0)
    rewards = generator.normal(0, 2, 200_000)
    chosen = generator.random(len(rewards)) < 1 / (1 + np.exp(-rewards))
    margins = np.where(chosen, rewards, -rewards)
    assert calibration_error(margins) < 0.01
    assert calibration_error(2 * margins) > 0.05
    bins = calibration(margins)
    assert sum(b["pairs"] for b in bins) == len(margins)
    assert all(b["from"] <= b["confidence"] <= b["to"] for b in bins)


def test_flips_are_counted_by_the_margin_of_the_reference():
    bins = by_reference_margin(pairs())
    by_low = {b["from"]: (b["pairs"], b["ranked_right"], b["flipped"]) for b in bins}
    assert by_low == {-5.0: (2, 1, 1), 0.0: (1, 1, 0), 5.0: (1, 1, 0)}
    far = of_pairs([0.0, 90.0], [0.0, 90.0], [1, 1], np.array([[1, 0], [0, 1]]))
    assert [(b["from"], b["to"]) for b in by_reference_margin(far)] == [(None, -50.0), (50.0, None)]
    assert "below -50 nats" in format_details({"eval": {"by_reference_margin": by_reference_margin(far)}})


def test_a_correlation_with_something_constant_is_zero():
    assert correlation(np.ones(4), np.arange(4)) == 0.0
    assert correlation(np.arange(4.0), -np.arange(4)) == pytest.approx(-1)


def test_confidence_of_an_extreme_margin_is_one():
    (record,) = calibration(np.array([1e4, -1e4]))
    assert (record["confidence"], record["accuracy"]) == (1.0, 0.5)
    assert math.isfinite(calibration_error(np.array([1e4, -1e4])))


def test_a_margin_that_is_no_number_is_in_no_bin():
    margins = np.array([math.nan, 2.0, -0.5, math.inf])
    assert calibration(margins) == calibration(margins[1:])
    assert math.isnan(calibration_error(margins))


def test_errors_of_shares_and_means_are_those_of_a_mean():
    values = measures(pairs(), rewards(0.1), beta=0.1)
    # Of four pairs two are ranked right, and one is gained: sqrt(p (1 - p) / (n - 1)).
    assert values["reference_ranking_accuracy_se"] == pytest.approx(math.sqrt(0.25 / 3))
    assert values["rankings_gained_se"] == pytest.approx(math.sqrt(0.1875 / 3))
    assert values["rankings_lost_se"] == values["idealized_ranking_accuracy_se"] == 0.0
    assert values["rewards/accuracies_chosen_shorter_se"] == pytest.approx(math.sqrt(0.25 / 1))
    # One pair says nothing of another draw.
    assert "rewards/accuracies_chosen_longer_se" not in values


def test_the_error_of_the_calibration_by_hand():
    """Two bins: one where the reward is too sure (sign -), one where it is not sure enough (sign +)."""
    margins = np.array([2.0, -2.0, -2.0, 0.3, 0.3])
    sure, unsure = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.3))
    terms = np.array([sure - 1, sure, sure, 1 - unsure, 1 - unsure])
    assert calibration_terms(margins) == pytest.approx(terms)
    assert calibration_error(margins) == pytest.approx(terms.mean())


@pytest.mark.parametrize("slope", [0.0, 0.5, -2.0])
def test_the_error_of_a_correlation_is_what_other_draws_show(slope):
    """Of normal numbers it is (1 - r^2) / sqrt(n); of others the spread over many draws."""
    generator = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(400):
        a = generator.exponential(1.0, 400)
        b = slope * a + generator.normal(0, 1, 400)
        found.append(correlation(a, b))
        terms = correlation_terms(a, b)
        errors.append(terms.std(ddof=1) / math.sqrt(len(terms)))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.12)
    a = generator.normal(0, 1, 100_000)
    b = slope * a + generator.normal(0, 1, 100_000)
    expected = (1 - correlation(a, b) ** 2) / math.sqrt(len(a))
    assert correlation_terms(a, b).std() / math.sqrt(len(a)) == pytest.approx(expected, rel=0.02)
    assert len(correlation_terms(np.ones(4), np.arange(4.0))) == 0


ERRORS = {"mean", "delta", "mean, over prompts", "delta, over prompts", "mean, over distinct pairs", "none: a count"}


def test_every_figure_is_defined_in_the_docs():
    """With its unit and its standard error, which is there where the docs say so; and a test names each."""
    root = Path(__file__).parents[3]
    lines = (root / "docs" / "evaluation.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| `")]
    kinds = {name.strip(" `"): error.strip() for name, _, _, error in rows}
    assert all(cell.strip() for row in rows for cell in row)
    assert set(kinds.values()) == ERRORS
    twice = of_pairs(*(np.tile(np.ravel(v), 2) for v in (POLICY, REFERENCE, LENGTHS)), np.arange(16).reshape(-1, 2))
    found = measures(twice, np.tile(rewards(0.1), 2), beta=0.1)
    drawn = divergence([np.ones(2), np.ones(3)], [np.zeros(2), np.ones(3)], samples=1)
    found |= {SAMPLED + name: value for name, value in drawn.items()}
    found |= share_measures(np.array([[0.7, 0.5, 2], [0.8, 0.75, 4]]))
    found |= mean_and_error("ranking_accuracy", np.array([1.0, 0.0]))
    found |= mean_and_error("ranking_accuracy_per_token", np.array([1.0, 0.0]))
    figures = {name for name in found if not name.endswith("_se")}
    assert figures == set(kinds)
    for name, kind in kinds.items():
        assert (f"{name}_se" in found) == (kind != "none: a count"), name
    tests = "".join(path.read_text() for path in (root / "tests" / "engine").rglob("test_*.py"))
    named = {name: (f'{name.removeprefix(SAMPLED)}"', f"{name}_se") for name in figures}
    assert [name for name, words in named.items() if not any(word in tests for word in words)] == []
