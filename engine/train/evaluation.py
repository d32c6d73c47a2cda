"""Metrics of a policy on held-out preference pairs: no gradients, no logits kept.

Beside the metrics of training under ``eval_`` names there is the ranking accuracy, which needs no reference: how often
the model gives the chosen response the higher log-prob, summed and per token; and for pairs what ``measures.py`` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.chunks import to_device

from .. import distributed, mesh, stop
from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset, pair_places
from ..digits import ERROR, figures, shown, shown_number
from ..durable import CONTINUE, write_atomically
from ..model import Policy
from ..model.layouts import settled
from ..packing import Pack, build_batch, group_costs, pack_lengths
from ..plain_json import to_json
from ..run_folder import (
    BY_LENGTH,
    EVAL_SOURCE,
    EVALUATION_FILE,
    PAIRS_BY_LENGTH,
    eval_prefixes,
    of_sources,
    tokens_of,
)
from .by_source import evaluation_by_source, without_sources
from .measures import by_reference_margin, calibration, mean_and_error, measures, most_displaced, of_pairs
from .metrics import PREFERENCE_NAMES, TOKEN_NAMES
from .objective import Objective
from .routing import Routing
from .scored import RowTerms, Scored
from .votes import Pair, judged_again, preference_shares, share_measures, share_table


class _Scores(NamedTuple):
    """Log-probs of all responses of a dataset, in its order."""

    logps_S: Tensor
    ref_S: Tensor | None
    sums_SK: Tensor
    """Of the statistics of tokens that were asked for, and last the log-probs without weights of tokens."""


def evaluate_policy(
    policy: Policy,
    dataset: PreferenceDataset,
    objective: Objective,
    config: RunConfig,
    *,
    lookup: Callable[[Pack], np.ndarray] | None,
    progress: bool = False,
    stoppable: bool = True,
    details: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Metrics of ``policy`` on ``dataset``; the policy's training mode is restored.

    Losses that couple pairs are computed over the whole dataset at once, and so is that which balances experts.

    Args:
        lookup: stored reference log-probs of some groups; None for a live reference or none.
        stoppable: whether a request to end is heeded.
        details: filled with what is more than a number: see ``_pair_details``.

    Raises:
        Stopped: between two packs, on all ranks, when any process was asked to end.
    """
    training = policy.training
    routing = Routing(policy, config.loss)
    policy.eval()
    try:
        with torch.no_grad():
            scores = _score_all(routing, dataset, objective, config, lookup, progress, stoppable)
    finally:
        policy.train(training)
    lengths = dataset.lengths
    per_group = tuple(lengths.responses.tolist())
    lengths_S = torch.from_numpy(np.concatenate([n[1:] for n in dataset.counted]))
    places_P2 = pair_places(dataset) if dataset.has_pairs.any() else None
    terms = RowTerms(
        None if places_P2 is None else torch.from_numpy(places_P2),
        _of_terms(dataset.weights_G, dataset, 1.0),
        _of_terms(dataset.margins_G, dataset, 0.0),
        torch.from_numpy(dataset.desirable_G) if objective.unpaired else None,
    )
    scored = objective.score(scores.logps_S, scores.ref_S, lengths_S, per_group, terms, sums_SK=scores.sums_SK)
    names = PREFERENCE_NAMES + TOKEN_NAMES if objective.token_stats else PREFERENCE_NAMES
    aux_loss = routing.aux_loss()
    means = routing.add_to(scored.means().to(policy.device), aux_loss)
    values = dict(zip((f"eval_{n}" for n in names), means.tolist(), strict=True))
    if not objective.unpaired:
        # A loss that couples pairs, or has one of all tokens in it, is no mean over pairs.
        left_out = {"loss"} if objective.couples_pairs or aux_loss is not None else set()
        values |= _errors(scored, left_out)
    if objective.unpaired:
        # What there is no row for is not a number.
        values = {name: value for name, value in values.items() if not math.isnan(value) or name == "eval_loss"}
        further = scored.further(len(dataset), whole=True)
        values |= {f"eval_{name}": value.item() for name, value in further.items()}
    if aux_loss is not None:
        values["eval_aux_loss"] = aux_loss.item()
    if objective.unpaired:
        values["eval_num_pairs"] = float(len(dataset))
        values |= evaluation_by_source(dataset, scored, None, has_losses=True)
        return values | _by_length(scored.accuracies, torch.from_numpy(dataset.trained.longest))
    summed, per_token = _ranking(objective.unweighted(scores.logps_S, scores.sums_SK), lengths_S, per_group)
    values |= mean_and_error("eval_ranking_accuracy", summed.numpy())
    values |= mean_and_error("eval_ranking_accuracy_per_token", per_token.numpy())
    values["eval_num_pairs"] = float(dataset.terms.sum())
    values |= evaluation_by_source(dataset, scored, summed, has_losses=not objective.couples_pairs)
    values |= _of_pairs(dataset, objective, scores, scored, lengths_S, places_P2, details)
    terms_G = torch.from_numpy(dataset.terms)
    right = summed.repeat_interleave(terms_G) if scores.ref_S is None else scored.accuracies
    return values | _by_length(right, torch.from_numpy(lengths.longest).repeat_interleave(terms_G))


def _errors(scored: Scored, left_out: set[str]) -> dict[str, float]:
    """Standard errors of the means over pairs, or rankings, that training has, too."""
    columns = zip(PREFERENCE_NAMES, scored.columns().cpu().numpy(), strict=True)
    found = (mean_and_error(f"eval_{name}", values_G) for name, values_G in columns if name not in left_out)
    return {name: value for of_one in found for name, value in of_one.items() if name.endswith(ERROR)}


def evaluate_splits(
    policy: Policy,
    datasets: Mapping[str, PreferenceDataset],
    objective: Objective,
    config: RunConfig,
    *,
    lookup: Callable[[str], Callable[[Pack], np.ndarray] | None],
    progress: bool = False,
    stoppable: bool = True,
    details: dict[str, dict[str, Any]] | None = None,
) -> dict[str, float]:
    """As ``evaluate_policy``, for each evaluation set of a run; the names of its metrics begin with its own name.

    Args:
        datasets: by name; ``train`` is left out.
        lookup: of a name.
        details: filled by name.
    """
    values: dict[str, float] = {}
    for split, dataset in datasets.items():
        if split == "train":
            continue
        own: dict[str, Any] = {}
        found = evaluate_policy(
            *(policy, dataset, objective, config),
            lookup=lookup(split),
            progress=progress,
            stoppable=stoppable,
            details=own,
        )
        if details is not None:
            details[split] = own
        # Those of the sets of a mixture, which is never one of several evaluation sets, keep their names.
        named = (name if name.startswith(EVAL_SOURCE) else f"{split}_{name.removeprefix('eval_')}" for name in found)
        values |= dict(zip(named, found.values(), strict=True))
    return values


def _of_pairs(
    dataset: PreferenceDataset,
    objective: Objective,
    scores: _Scores,
    scored: Scored,
    lengths_S: Tensor,
    places_P2: np.ndarray | None,
    details: dict[str, Any] | None,
) -> dict[str, float]:
    """``measures`` under ``eval_`` names; nothing of rankings of more than two responses.

    Args:
        details: gets ``calibration`` and, with a reference, ``by_reference_margin`` and ``most_displaced``: lists of
            records, the last with the places in ``dataset`` of groups.
    """
    if places_P2 is None:
        if (dataset.lengths.responses != 2).any():
            return {}
        places_P2 = np.arange(2 * len(dataset)).reshape(-1, 2)
    # Stored sums of weighted tokens are no log-probs of responses.
    weighted = objective.ld_alpha is not None or dataset.weighs_tokens
    reference_S = None if weighted else scores.ref_S
    pairs = of_pairs(objective.unweighted(scores.logps_S, scores.sums_SK), reference_S, lengths_S, places_P2)
    margins_P = (scored.chosen_rewards - scored.rejected_rewards).double().cpu().numpy()
    groups_P = np.repeat(np.arange(len(dataset)), dataset.terms)
    shares_D3 = preference_shares(margins_P, *judged_again(_sides(dataset, groups_P, places_P2)))
    if details is not None:
        details["calibration"] = calibration(margins_P)
        details["preference_shares"] = share_table(shares_D3)
        if pairs.reference is not None:
            change_P2 = pairs.policy - pairs.reference
            details["by_reference_margin"] = by_reference_margin(pairs)
            details["most_displaced"] = [
                {"group": int(groups_P[p]), "chosen": change_P2[p, 0], "rejected": change_P2[p, 1]}
                for p in most_displaced(pairs)
            ]
    loss = objective.config
    found = measures(pairs, margins_P, beta=loss.beta, label_smoothing=loss.label_smoothing)
    found |= share_measures(shares_D3)
    return {f"eval_{name}": value for name, value in found.items()}


def _sides(dataset: PreferenceDataset, groups_P: np.ndarray, places_P2: np.ndarray) -> Iterator[Pair]:
    first_G = np.cumsum(dataset.lengths.responses) - dataset.lengths.responses
    for group, (chosen, rejected) in zip(groups_P, places_P2 - first_G[groups_P, None], strict=True):
        yield dataset[int(group)], int(chosen), int(rejected)


def _score_all(
    routing: Routing,
    dataset: PreferenceDataset,
    objective: Objective,
    config: RunConfig,
    lookup: Callable[[Pack], np.ndarray] | None,
    progress: bool,
    stoppable: bool,
) -> _Scores:
    from tqdm.auto import tqdm

    policy, device = routing.policy, routing.policy.device
    packing = settled(config.packs, policy)
    packs = pack_lengths(
        dataset.lengths,
        packing.tokens_per_pack,
        share_prompts=packing.share_prompts,
        in_rows=policy.layout.in_rows,
    )
    costs_G = group_costs(dataset.lengths, share_prompts=packing.share_prompts)
    costs = [int(costs_G[list(pack)].sum()) for pack in packs]
    share = mesh.own_share(costs)
    # Forward passes of a sharded model are joint: who has no pack left runs the cheapest one again.
    cheapest = costs.index(min(costs))
    own, columns = [], []
    quiet = True if not (progress and distributed.is_main()) else None
    for place in tqdm(share, desc="evaluation", unit="pack", disable=quiet):
        if stoppable:
            stop.check()
        pack = packs[cheapest if place is None else place]
        batch = build_batch([dataset[i] for i in pack], share_prompts=packing.share_prompts).to(device)
        stored = None if lookup is None else to_device(torch.from_numpy(lookup(pack)), device)
        logps_S, sums_SK, _ = objective.score_responses(routing, batch, counts=place is not None)
        ref_S = objective.reference(batch, stored)
        if place is not None:
            own.append(pack)
            unweighted_S = objective.unweighted(logps_S, sums_SK)
            stats_SK = sums_SK[:, : len(objective.stats)]
            pair = torch.stack([logps_S, torch.zeros_like(logps_S) if ref_S is None else ref_S], 1)
            columns.append(torch.cat([pair, stats_SK, unweighted_S[:, None]], 1))
    # The host waits here, once, and not for every pack.
    rows_SC = torch.cat(columns).cpu() if columns else torch.zeros(0, 3 + len(objective.stats))
    order = _response_order(dataset, [pack for packs in mesh.gather(own) for pack in packs])
    logps_S, ref_S, *sums = torch.cat(mesh.concat_over_packs(rows_SC))[order].unbind(1)
    return _Scores(logps_S, ref_S if objective.needs_reference else None, torch.stack(sums, 1))


def _of_terms(values_G: np.ndarray, dataset: PreferenceDataset, usual: float) -> Tensor | None:
    """fp32 [P]: the number of each group for each of its losses; None where all are as usual."""
    if (values_G == usual).all():
        return None
    return torch.from_numpy(np.repeat(values_G, dataset.terms)).float()


def _response_order(dataset: PreferenceDataset, packs: list[Pack]) -> Tensor:
    """Where the responses of the dataset, in its order, are in the concatenated packs."""
    counts = dataset.lengths.responses
    first = np.concatenate([[0], np.cumsum(counts)])
    places = np.concatenate([np.arange(first[i], first[i + 1]) for pack in packs for i in pack])
    return torch.from_numpy(np.argsort(places, kind="stable"))


def _ranking(logps_S: Tensor, lengths_S: Tensor, per_group: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """fp32 [G] each: whether the best response has the higher log-prob than all others, summed and per token."""
    summed, averaged = [], []
    means_S = logps_S / lengths_S
    for logps, means in zip(logps_S.split(per_group), means_S.split(per_group), strict=True):
        summed.append((logps[0] > logps[1:]).all())
        averaged.append((means[0] > means[1:]).all())
    return torch.stack(summed).float(), torch.stack(averaged).float()


def _by_length(right: Tensor, longest: Tensor) -> dict[str, float]:
    """Accuracy, and number of pairs, by the tokens of the longest response of their group in powers of two.

    Args:
        right: of each pair or ranking: the accuracy of the rewards, or of the ranking for a loss without a reference.
    """
    right = right.double()
    values: dict[str, float] = {}
    low, high = 1, 32
    while low <= int(longest.max()):
        inside = (longest >= low) & (longest <= high)
        if inside.any():
            values[f"{BY_LENGTH}{low}-{high}"] = right[inside].mean().item()
            values[f"{PAIRS_BY_LENGTH}{low}-{high}"] = float(inside.sum())
        low, high = high + 1, high * 2
    return values


def _source_lines(values: dict[str, float]) -> list[str]:
    """A table of the sets of a mixture."""
    of_sets = of_sources(EVAL_SOURCE, values)
    columns = {"pairs": "num_pairs", "loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    if not of_sets:
        return []
    width = max(30, *map(len, of_sets))
    lines = ["", f"{'set':<{width}} " + " ".join(f"{head:>12}" for head in columns)]
    for label, metrics in of_sets.items():
        cells = (f"{shown(name, metrics.get(name)):>12}" for name in columns.values())
        lines.append(f"{label:<{width}} " + " ".join(cells))
    return lines


def scalar_metrics(values: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation without those by length: what a row of ``metrics.jsonl`` holds."""
    return {k: v for k, v in values.items() if tokens_of(k) is None}


def write_evaluation(run_dir: Path, values: dict[str, float], *, elsewhere: str = CONTINUE) -> None:
    """Write ``evaluation.json`` of a run folder; ``elsewhere`` is what to do where the disk does not take it."""
    write_atomically(run_dir / EVALUATION_FILE, to_json(values, indent=1) + "\n", elsewhere=elsewhere)


def format_evaluation(values: dict[str, float]) -> str:
    """The table that ``dpo evaluate`` prints."""
    lines: list[str] = []
    for prefix in eval_prefixes(values):
        own = {f"eval_{name.removeprefix(prefix)}": v for name, v in values.items() if _owner(name, values) == prefix}
        head = prefix.removeprefix("eval_").removesuffix("_")
        lines += ([""] if lines else []) + ([head] if head else []) + _set_lines(own, _source_lines(values))
    return "\n".join(lines)


def _owner(name: str, metrics: Iterable[str]) -> str:
    """The longest prefix of evaluation sets that a metric begins with."""
    return max((prefix for prefix in eval_prefixes(metrics) if name.startswith(prefix)), key=len, default="")


def _set_lines(values: dict[str, float], of_mixture: list[str]) -> list[str]:
    totals = without_sources(scalar_metrics(values))
    width = max(30, *(len(name.removeprefix("eval_")) for name in totals))
    lines = [f"{name.removeprefix('eval_'):<{width}} {_aligned(words)}" for name, words in figures(totals).items()]
    lines += of_mixture
    lengths = [key.removeprefix(BY_LENGTH) for key in values if key.startswith(BY_LENGTH)]
    if lengths:
        unit = "rows" if "eval_count/chosen" in values else "pairs"
        lines += ["", f"{'tokens of the longest response':<30} {'accuracy':>12} {unit:>8}"]
        for bucket in lengths:
            count = values[f"{PAIRS_BY_LENGTH}{bucket}"]
            lines.append(f"{bucket:<30} {shown_number(values[BY_LENGTH + bucket]):>12} {count:>8.0f}")
    return lines


def _aligned(figure: str) -> str:
    """A figure in words whose value, without its error, ends where those of others do."""
    value, sign, error = figure.replace("\u00a0", " ").partition(" ±")
    return f"{value:>12}{sign}{error}"


def evaluation_lines(row: Mapping[str, float]) -> list[str]:
    """A readable line for each evaluation set in a row of metrics."""
    metrics = (("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin"), ("kl", "kl"))
    lines, shown = [], figures(row)
    for prefix in eval_prefixes(row):
        head = f"step {row['step']}  {prefix.removesuffix('_').replace('eval_', 'eval ')} "
        found = [(prefix + metric, word) for metric, word in metrics if prefix + metric in row]
        lines.append(head + "  ".join(f"{word} {_aligned(shown[name]).strip()}" for name, word in found))
    return lines
