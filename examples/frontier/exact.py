"""Log-probs of every answer there is, expectations over them, and the optimum that they give in closed form.

Legend: P prompts, Y answers, W words (tokens other than END), V vocabulary, L tokens of an answer at most. Answers are
ordered by their number of words; the last W^L have no END. Tensors of answers are float64 [P, Y], in nats.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .language import MAX_TOKENS, PROMPTS, TOKEN, VOCABULARY, reward

ROWS = 6000
"""Sequences in one forward pass."""


class Point(NamedTuple):
    """A policy by its expectations, the mean over prompts."""

    kl: float
    """KL(policy || reference) of a whole answer, in nats."""
    reward: float


@functools.cache
def answers(max_tokens: int = MAX_TOKENS) -> list[tuple[int, ...]]:
    """The token ids of every answer."""
    words = range(1, len(VOCABULARY))
    ended = [(*prefix, TOKEN["<end>"]) for depth in range(max_tokens) for prefix in product(words, repeat=depth)]
    return [*ended, *product(words, repeat=max_tokens)]


@functools.cache
def rewards(max_tokens: int = MAX_TOKENS) -> Tensor:
    """[P, Y], the reward of each answer."""
    return torch.tensor(
        [
            [reward(prompt, {VOCABULARY[token] for token in answer}) for answer in answers(max_tokens)]
            for prompt in PROMPTS
        ],
        dtype=torch.float64,
    )


@torch.no_grad()
def answer_logps(model: Any, max_tokens: int = MAX_TOKENS) -> Tensor:
    """[P, Y], log-probs of every answer under a causal language model, added up from softmaxes in float64."""
    W, L = len(VOCABULARY) - 1, max_tokens
    prefixes = torch.cartesian_prod(*[torch.arange(1, W + 1)] * (L - 1)).view(-1, L - 1)
    found = []
    for prompt in PROMPTS:
        ids = torch.cat((torch.full((len(prefixes), 1), TOKEN[prompt]), prefixes), 1)
        logits = torch.cat([model(input_ids=rows).logits.double() for rows in ids.split(ROWS)])
        token_logps = logits.log_softmax(-1)
        total, ended = torch.zeros(1, dtype=torch.float64), []
        for depth in range(L):
            # Of the sequences that begin alike, one stands for all.
            next_WV = token_logps[:: W ** (L - 1 - depth), depth]
            ended.append(total + next_WV[:, TOKEN["<end>"]])
            total = (total[:, None] + next_WV[:, 1:]).flatten()
        found.append(torch.cat((*ended, total)))
    return torch.stack(found)


def point(logps: Tensor, ref_logps: Tensor, rewards: Tensor) -> Point:
    """Expectations under the policy whose log-probs are ``logps``."""
    p = logps.exp()
    # 0 log 0 is 0.
    kl = torch.where(p > 0, p * (logps - ref_logps), 0.0).sum(1).mean()
    return Point(kl.item(), (p * rewards).sum(1).mean().item())


def optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The policy that has the most reward - beta * KL: log of pi_ref exp(r / beta) / Z [P, Y], and log Z [P]."""
    tilted = ref_logps + rewards / beta
    log_z = tilted.logsumexp(1)
    return tilted - log_z[:, None], log_z


def by_reward(ref_logps: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The closed form's answers, one for all that have the same reward: log-probs of the reference and rewards [P, R].

    The optimum tilts answers by their reward alone, so its expectations are the same, from a thousandth of the terms.
    """
    values, place = rewards.unique(return_inverse=True)
    mass = ref_logps.new_zeros(len(rewards), len(values)).scatter_add_(1, place, ref_logps.exp())
    return mass.log(), values.expand(len(rewards), -1)


def best_reward(kl: float, ref_logps: Tensor, rewards: Tensor) -> float:
    """The highest reward of any policy with this KL: that of the optimum whose KL it is, found by bisection."""
    low, high = 1e-3, 1e6
    for _ in range(80):
        beta = (low * high) ** 0.5
        found = point(optimum(ref_logps, rewards, beta)[0], ref_logps, rewards)
        low, high = (beta, high) if found.kl > kl else (low, beta)
    # The Lagrangian bounds every policy for any beta, so the result is a bound even where bisection has not ended.
    beta = (low * high) ** 0.5
    return (beta * optimum(ref_logps, rewards, beta)[1]).mean().item() + beta * kl
