"""How much the estimated preference score of a pair varies with the masks, by how they are drawn.

The score that DPO takes the log-sigmoid of is, before beta,

    s = [ELBO policy(w) - ELBO reference(w)] - [ELBO policy(l) - ELBO reference(l)]

for the chosen response w and the rejected l. Bias and variance of the loss and of its gradient are bounded by the
variance of its estimate (LLaDA 1.5, arXiv 2505.19223).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .elbo import Sampler, elbo_values
from .language import WINDOW, Pairs
from .model import MaskedModel

SAMPLERS = {
    "1 time, 8 masks": Sampler(form="bernoulli", times=1, masks=8),
    "8 times": Sampler(form="bernoulli", times=8),
    "4 times + complements": Sampler(form="bernoulli", times=4, paired=True),
    "1 count, 8 masks": Sampler(form="count", times=1, masks=8),
    "8 counts": Sampler(form="count", times=8),
    "4 counts + complements": Sampler(form="count", times=4, paired=True),
    "4 spread + complements": Sampler(form="count", times=4, paired=True, stratified=True),
}
"""All take 8 forward passes of each response under each model. "Times": each token is masked with probability t, and
counts 1/t; "counts": exactly l tokens of R are, and count R/l."""
NAIVE, BEST = "1 time, 8 masks", "4 spread + complements"


@dataclass(frozen=True)
class Variance:
    """Of the score over draws of masks, in square nats, the mean over pairs."""

    own: float
    """Policy and reference each with masks of their own."""
    shared: float
    """Both with the same masks."""


def measure(policy: MaskedModel, reference: MaskedModel, pairs: Pairs, draws: int, seed: int) -> dict[str, Variance]:
    """Variances by name of the sampler, each from ``draws`` estimates of the score of every pair."""
    found = {}
    for name, sampler in SAMPLERS.items():
        generator = torch.Generator().manual_seed(seed)
        scores = torch.stack([_scores(policy, reference, pairs, sampler, generator) for _ in range(draws)])
        policy_DB, reference_DB = scores.unbind(1)
        found[name] = Variance(
            # Of independent estimates the variances add.
            own=(policy_DB.var(0) + reference_DB.var(0)).mean().item(),
            shared=(policy_DB - reference_DB).var(0).mean().item(),
        )
    return found


def _scores(
    policy: MaskedModel, reference: MaskedModel, pairs: Pairs, sampler: Sampler, generator: torch.Generator
) -> Tensor:
    """[2, B]: what the ELBO of the chosen response has above that of the rejected one, under policy and reference."""
    responses = pairs.responses()
    masks = sampler.draw(len(responses.prompts_BP), WINDOW, generator)
    chosen, rejected = torch.stack([elbo_values(model, *responses, masks) for model in (policy, reference)]).chunk(2, 1)
    return (chosen - rejected).double()
