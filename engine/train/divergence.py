"""How far a policy is from the reference where the policy itself goes: KL divergence, estimated on its own answers.

Definitions are in docs/evaluation.md. Shape suffixes: N tokens of all answers, S answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..digits import ERROR
from ..errors import UserError
from ..model import Policy
from ..model.generation import generate
from ..model.layouts import settled
from ..model.stops import stop_ids
from ..packing import build_batch, pack_lengths
from .measures import mean_and_error
from .samples import distinct_prompts


def sampled_divergence(
    policy: Policy, reference: Policy, dataset: PreferenceDataset, config: RunConfig, tokenizer: Any, *, samples: int
) -> dict[str, float]:
    """KL(policy || reference) of answers to the first ``train.sample_prompts`` prompts of a dataset, by name.

    Answers are drawn at temperature 1 and cut at ``train.sample_max_new_tokens``, so that this is the divergence of
    that many tokens.

    Args:
        reference: taken in its reference mode; it may be ``policy``.
        samples: answers to each prompt.

    Raises:
        UserError: an answer with its prompt is longer than a pack.
    """
    prompts = [group for group in distinct_prompts(dataset, config.train.sample_prompts) for _ in range(samples)]
    answers = generate(
        policy,
        [group.prompt_ids for group in prompts],
        stops=stop_ids(config.model, tokenizer),
        max_new_tokens=config.train.sample_max_new_tokens,
        seed=config.train.seed,
        tokens_per_batch=config.packing.tokens_per_pack,
    )
    drawn = PreferenceDataset(
        PreferenceGroup(group.row, group.prompt_ids, (answer,)) for group, answer in zip(prompts, answers, strict=True)
    )
    _check_fit(drawn, config)
    own = token_logps(policy, drawn, config)
    with reference.reference_mode():
        other = token_logps(reference, drawn, config)
    return divergence(own, other, samples)


def _check_fit(drawn: PreferenceDataset, config: RunConfig) -> None:
    longest = max(drawn, key=lambda group: len(group.prompt_ids) + len(group.response_ids[0]))
    tokens, limit = len(longest.prompt_ids) + len(longest.response_ids[0]), config.packing.tokens_per_pack
    if tokens > limit:
        raise UserError(
            f"the prompt of row {longest.label} and the answer drawn to it have {tokens:,} tokens, more than "
            f"packing.tokens_per_pack={limit:,}: raise that, or lower train.sample_max_new_tokens"
        )


def divergence(own: Sequence[np.ndarray], other: Sequence[np.ndarray], samples: int) -> dict[str, float]:
    """Estimates and their standard errors from log-probs of the tokens of answers that the policy drew.

    ``kl`` is the mean of log-ratios, ``kl_k3`` that of exp(-log-ratio) - 1 + log-ratio of single tokens, summed over an
    answer: both are unbiased, and the second varies less where the two models are close. Schulman 2020, "Approximating
    KL divergence", http://joschu.net/blog/kl-approx.html.

    Args:
        own, other: of policy and reference, for each answer; those to one prompt stand together.
        samples: answers to a prompt. Errors are those of means over prompts.
    """
    ratios = [a.astype(np.float64) - b for a, b in zip(own, other, strict=True)]
    k1_S = np.array([ratio.sum() for ratio in ratios])
    k3_S = np.array([(np.expm1(-ratio) + ratio).sum() for ratio in ratios])
    lengths_S = np.array([len(ratio) for ratio in ratios], dtype=np.float64)
    return {
        **_mean_over_prompts("kl", k1_S, samples),
        **_mean_over_prompts("kl_k3", k3_S, samples),
        **_of_tokens("kl_per_token", k1_S, lengths_S, samples),
        "num_samples": float(len(ratios)),
        **_mean_over_prompts("sample_length", lengths_S, samples),
    }


def _mean_over_prompts(name: str, values_S: np.ndarray, samples: int) -> dict[str, float]:
    return mean_and_error(name, values_S.reshape(-1, samples).mean(1))


def _of_tokens(name: str, sums_S: np.ndarray, lengths_S: np.ndarray, samples: int) -> dict[str, float]:
    """The sum of ``sums_S`` over all tokens; its error is that of a ratio of two means over prompts (delta method)."""
    sums, lengths = (values.reshape(-1, samples).mean(1) for values in (sums_S, lengths_S))
    ratio = float(sums.sum() / lengths.sum())
    error = mean_and_error("", (sums - ratio * lengths) / lengths.mean()).get(ERROR)
    return {name: ratio} | ({} if error is None else {name + ERROR: error})


@torch.no_grad()
def token_logps(policy: Policy, dataset: PreferenceDataset, config: RunConfig) -> list[np.ndarray]:
    """fp32, the log-probs of the tokens of each response, in the order of the dataset."""
    packing = settled(config.packing, policy)
    found: dict[int, list[np.ndarray]] = {}
    training = policy.training
    policy.eval()
    try:
        for pack in pack_lengths(
            dataset.lengths,
            packing.tokens_per_pack,
            share_prompts=packing.share_prompts,
            in_rows=policy.layout.in_rows,
        ):
            batch = build_batch([dataset[i] for i in pack], share_prompts=packing.share_prompts).to(policy.device)
            parts = iter(policy.logps(batch).cpu().split(batch.lengths_S.tolist()))
            for i in pack:
                found[i] = [next(parts).numpy() for _ in dataset[i].response_ids]
    finally:
        policy.train(training)
    return [part for i in range(len(dataset)) for part in found[i]]
