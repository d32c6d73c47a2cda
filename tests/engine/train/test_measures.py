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
    correlation,
    format_details,
    idealized,
    measures,
    most_displaced,
    of_pairs,
)

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


def test_every_figure_is_defined_in_the_docs():
    """And the docs define no other, but those that evaluation takes from training and ranking accuracy."""
    lines = Path(__file__).parents[3].joinpath("docs", "evaluation.md").read_text().splitlines()
    figures = [line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")]
    text = " ".join(lines)
    found = measures(pairs(), rewards(0.1), beta=0.1)
    drawn = divergence([np.ones(2)] * 2, [np.ones(2)] * 2, samples=1)
    found |= {SAMPLED + name: value for name, value in drawn.items()}
    assert set(found) - set(figures) == {name for name in found if name.endswith("_se")}
    assert all(f"`{name}`" in text for name in found)
    assert set(figures) - set(found) == {"ranking_accuracy", "ranking_accuracy_per_token"}
