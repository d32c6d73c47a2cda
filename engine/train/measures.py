"""What log-probs of held-out pairs say beside the loss: rankings, displacement, calibration, bias towards length.

Definitions, units and estimators are in docs/evaluation.md. Everything is computed in float64 from one number a
response, on the host.

Shape suffixes: P pairs, S responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..data.groups import PreferenceDataset
from ..digits import ERROR, shown_number
from ..errors import shortened
from ..run_folder import bin_words

CALIBRATION_BINS = 10
REFERENCE_MARGINS = (-math.inf, -50.0, -20.0, -10.0, -5.0, 0.0, 5.0, 10.0, 20.0, 50.0, math.inf)
"""Edges of the bins of ``by_reference_margin``, in nats."""
WORST = 10
"""Rows of ``most_displaced``; a terminal shows the first."""
_SHOWN = 3


class PairLogps(NamedTuple):
    """Of each pair, float64 [P, 2]: (chosen, rejected)."""

    policy: np.ndarray
    """Log-probs of whole responses, in nats."""
    reference: np.ndarray | None
    lengths: np.ndarray
    """Tokens of the responses that count."""


def of_pairs(logps_S: Any, ref_S: Any | None, lengths_S: Any, places_P2: np.ndarray) -> PairLogps:
    """What is known of single responses, for pairs of them."""
    policy, lengths = (np.asarray(values, dtype=np.float64)[places_P2] for values in (logps_S, lengths_S))
    reference = None if ref_S is None else np.asarray(ref_S, dtype=np.float64)[places_P2]
    return PairLogps(policy, reference, lengths)


def measures(pairs: PairLogps, margins_P: Any, *, beta: float, label_smoothing: float = 0.0) -> dict[str, float]:
    """Single numbers about pairs, by name.

    Args:
        margins_P: reward of the chosen response less that of the rejected one, by the run's loss.
        beta: of the loss.
        label_smoothing: the share of labels that are taken to be wrong.
    """
    margins_P = np.asarray(margins_P, dtype=np.float64)
    longer_P = pairs.lengths[:, 0] - pairs.lengths[:, 1]
    right_P = margins_P > 0
    values = {
        "calibration_error": calibration_error(margins_P),
        **_error("calibration_error", calibration_terms(margins_P)),
        "length_bias": correlation(margins_P, longer_P),
        **_error("length_bias", correlation_terms(margins_P, longer_P)),
        **mean_and_error("rewards/accuracies_chosen_longer", right_P[longer_P > 0]),
        **mean_and_error("rewards/accuracies_chosen_shorter", right_P[longer_P < 0]),
    }
    if pairs.reference is None:
        return values
    policy_P, reference_P = _gaps(pairs.policy), _gaps(pairs.reference)
    per_token_P = _gaps(pairs.reference / np.maximum(pairs.lengths, 1))
    change_P2 = pairs.policy - pairs.reference
    for name, of_pairs_P in (
        ("reference_ranking_accuracy", reference_P > 0),
        ("reference_ranking_accuracy_per_token", per_token_P > 0),
        ("idealized_ranking_accuracy", idealized(reference_P, beta, label_smoothing)),
        ("rankings_gained", (policy_P > 0) & (reference_P <= 0)),
        ("rankings_lost", (policy_P <= 0) & (reference_P > 0)),
        ("logps_change/chosen", change_P2[:, 0]),
        ("logps_change/rejected", change_P2[:, 1]),
        ("chosen_fell", change_P2[:, 0] < 0),
    ):
        values |= mean_and_error(name, of_pairs_P)
    return values


def idealized(reference_P: np.ndarray, beta: float, label_smoothing: float) -> np.ndarray:
    """Whether a policy that minimises the DPO loss exactly gives the chosen response the higher log-prob; bool [P].

    With a share ``a`` of labels in favour of the chosen response, the log-ratio of the two is the reference's plus
    ``log(a / (1 - a)) / beta``. Chen et al. 2024, "Preference Learning Algorithms Do Not Learn Preference Rankings",
    arXiv 2405.19534, section 3.

    Args:
        reference_P: log-prob of the chosen response less that of the rejected one, under the reference.
        label_smoothing: ``1 - a``. With 0 no finite gap of the reference is too large.
    """
    if label_smoothing == 0:
        return np.full(len(reference_P), True)
    return reference_P + math.log((1 - label_smoothing) / label_smoothing) / beta > 0


def calibration_error(margins_P: np.ndarray) -> float:
    """Expected calibration error: see ``calibration``. Guo et al. 2017, arXiv 1706.04599. Not a number where a margin
    is none."""
    if np.isnan(margins_P).any():
        return math.nan
    bins = calibration(margins_P)
    return sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / max(len(margins_P), 1)


def calibration_terms(margins_P: np.ndarray) -> np.ndarray:
    """float64 [P], whose mean is ``calibration_error``: right or not less the confidence, with the sign that the bin of
    each has. The error is their standard error as long as no bin's sign is in doubt."""
    confidence_P, place_P = _confidence(margins_P)
    gap_P = (margins_P > 0) - confidence_P
    sums = np.bincount(place_P, gap_P, minlength=CALIBRATION_BINS)
    return np.sign(sums)[place_P] * gap_P


def _confidence(margins_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How sure the reward of each pair is, float64 [P], and its bin, int64 [P]; a margin that is no number is in the
    first."""
    # A margin far from 0 is as sure as one of 700 is.
    confidence_P = 1 / (1 + np.exp(-np.minimum(np.abs(margins_P), 700.0)))
    sure_P = np.nan_to_num(confidence_P, nan=0.5)
    return confidence_P, np.minimum(((sure_P - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def calibration(margins_P: np.ndarray) -> list[dict[str, float]]:
    """How often the implicit reward is right, beside how sure it is, in bins of equal width; empty bins are left out,
    and so are margins that are no numbers.

    The reward of a pair prefers one response with probability ``sigmoid(|margin|)``, the Bradley-Terry model's.
    """
    margins_P = margins_P[~np.isnan(margins_P)]
    confidence_P, place_P = _confidence(margins_P)
    found = []
    for place in np.unique(place_P):
        inside = place_P == place
        found.append(
            {
                "from": 0.5 + place / (2 * CALIBRATION_BINS),
                "to": 0.5 + (place + 1) / (2 * CALIBRATION_BINS),
                "pairs": float(inside.sum()),
                "confidence": float(confidence_P[inside].mean()),
                "accuracy": float((margins_P[inside] > 0).mean()),
            }
        )
    return found


def by_reference_margin(pairs: PairLogps) -> list[dict[str, float | None]]:
    """How many pairs the policy ranks right, by how much the reference prefers the chosen response (nats).

    Bins that hold no pair are left out; None is no bound.
    """
    assert pairs.reference is not None
    policy_P, reference_P = _gaps(pairs.policy), _gaps(pairs.reference)
    found: list[dict[str, float | None]] = []
    for low, high in pairwise(REFERENCE_MARGINS):
        inside = (reference_P > low) & (reference_P <= high)
        if inside.any():
            right = policy_P[inside] > 0
            flipped = right != (reference_P[inside] > 0)
            counts = {"pairs": inside.sum(), "ranked_right": right.sum(), "flipped": flipped.sum()}
            edges = {"from": low, "to": high}
            found.append(
                {name: edge if math.isfinite(edge) else None for name, edge in edges.items()}
                | {name: float(count) for name, count in counts.items()}
            )
    return found


def most_displaced(pairs: PairLogps, count: int = WORST) -> list[int]:
    """The pairs whose chosen response lost the most log-prob, worst first; only those where it fell."""
    assert pairs.reference is not None
    change_P = (pairs.policy - pairs.reference)[:, 0]
    return [int(place) for place in np.argsort(change_P, kind="stable")[:count] if change_P[place] < 0]


def with_text(details: Mapping[str, dict[str, Any]], datasets: Mapping[str, PreferenceDataset], tokenizer: Any) -> None:
    """Put row, prompt and responses beside each group of ``most_displaced``, as the tokenizer decodes them."""
    for split, found in details.items():
        for record in found.get("most_displaced", ()):
            group = datasets[split][record.pop("group")]
            chosen, rejected = (group.pairs or ((0, 1),))[0]
            texts = (group.prompt_ids, group.response_ids[chosen], group.response_ids[rejected])
            names = ("prompt", "chosen_response", "rejected_response")
            record["row"] = group.label
            record |= {name: tokenizer.decode(ids) for name, ids in zip(names, texts, strict=True)}


def format_details(details: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables for a terminal: rankings by the margin of the reference, calibration, rows that lost the most."""
    lines: list[str] = []
    for split, found in details.items():
        of = "" if split == "eval" else f", {split.removeprefix('eval_')}"
        if bins := found.get("by_reference_margin"):
            lines += ["", f"{f'reference prefers chosen by{of}':<40} {'pairs':>8} {'ranked right':>13} {'flipped':>8}"]
            for b in bins:
                counts = f"{b['pairs']:>8.0f} {b['ranked_right']:>13.0f} {b['flipped']:>8.0f}"
                lines.append(f"{bin_words(b) + ' nats':<40} {counts}")
        if bins := found.get("calibration"):
            lines += ["", f"{f'confidence of the reward{of}':<40} {'pairs':>8} {'confidence':>13} {'right':>8}"]
            for b in bins:
                lines.append(_shares_line(b, "confidence", "accuracy"))
        if bins := found.get("preference_shares"):
            lines += ["", f"{f'judged more than once{of}':<40} {'pairs':>8} {'predicted':>13} {'observed':>8}"]
            for b in bins:
                lines.append(_shares_line(b, "predicted", "observed"))
        if worst := found.get("most_displaced"):
            lines += ["", f"chosen responses whose log-prob fell most{of}"]
            for r in worst[:_SHOWN]:
                lines.append(f"row {r['row']}: {r['chosen']:+.1f} nats: {shortened(r['chosen_response'])}")
    return "\n".join(lines)


def _shares_line(found: Mapping[str, Any], first: str, second: str) -> str:
    pairs, *shares = f"{found['pairs']:.0f}", shown_number(found[first]), shown_number(found[second])
    return f"{bin_words(found):<40} {pairs:>8} {shares[0]:>13} {shares[1]:>8}"


def correlation(a_P: np.ndarray, b_P: np.ndarray) -> float:
    """Pearson's; 0 where one of the two is the same for all pairs."""
    a_P, b_P = (values - values.mean() if len(values) else values for values in (a_P, b_P.astype(np.float64)))
    scale = math.sqrt(float(a_P @ a_P) * float(b_P @ b_P))
    return float(a_P @ b_P) / scale if scale else 0.0


def correlation_terms(a_P: np.ndarray, b_P: np.ndarray) -> np.ndarray:
    """float64 [P], whose standard error is that of ``correlation``: its influence function, by the delta method, which
    needs no normal distribution. Empty where the correlation is 0 for want of spread."""
    b_P = b_P.astype(np.float64)
    if not (len(a_P) and np.ptp(a_P) > 0 and np.ptp(b_P) > 0):
        return np.zeros(0)
    a_P, b_P = ((values - values.mean()) / values.std() for values in (a_P, b_P))
    return a_P * b_P - (a_P * b_P).mean() * (a_P**2 + b_P**2) / 2


def _gaps(values_P2: np.ndarray) -> np.ndarray:
    return values_P2[:, 0] - values_P2[:, 1]


def mean_and_error(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean, and its standard error where there are two or more; nothing of nothing.

    Args:
        values: one of each pair that is independent of the others; of shares whether it is one.
    """
    return {name: float(values.mean()), **_error(name, values)} if len(values) else {}


def _error(name: str, values: np.ndarray) -> dict[str, float]:
    if len(values) < 2:
        return {}
    return {name + ERROR: float(values.astype(np.float64).std(ddof=1) / math.sqrt(len(values)))}
