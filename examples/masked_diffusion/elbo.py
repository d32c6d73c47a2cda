"""Estimates of the log-probs of responses under a masked-diffusion model, by random masks.

The log-prob of a response y of R tokens to a prompt x is not known; its evidence lower bound (ELBO) is, as a mean over
masks M. A token is masked with probability t, t being uniform on (0, 1), or, which is the same, l tokens are, l being
uniform on 1..R:

    ELBO(y | x) = E_t E_M [ 1/t sum_{i in M} log p(y_i | x, y without M) ]      form "bernoulli"
                = E_l E_M [ R/l sum_{i in M} log p(y_i | x, y without M) ]      form "count"

Sahoo et al. 2024 (MDLM, arXiv 2406.07524), Ou et al. 2024 (arXiv 2406.03736); for responses, and in the second form, of
less variance, Nie et al. 2025 (LLaDA, arXiv 2502.09992, Eq. 6).

Legend: B responses, R places of a response, n masks of each, P tokens of a prompt, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dpo_kernels import linear_logps

from .model import MaskedModel

IGNORED = -100
SHORTEST_TIME = 1e-3
"""Of the form "bernoulli": 1/t has no finite variance down to t = 0, so times are cut, as is usual."""
_SEQUENCES = 512
"""So many go through the model at once where no gradient is wanted."""


class Masks(NamedTuple):
    """Masks of responses, and what the sum of log-probs under each counts."""

    masked_BnR: Tensor
    """bool"""
    weights_Bn: Tensor
    """float32, positive; a mask that hides nothing has a sum of 0."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How masks are drawn. The mean of all is the ELBO, but for the cut of times; the variance differs."""

    form: Literal["bernoulli", "count"] = "count"
    times: int = 4
    """Times t (or counts l) of each response."""
    masks: int = 1
    """Masks of each time."""
    paired: bool = False
    """With every mask goes one of the tokens that it leaves: the complement, at time 1 - t."""
    stratified: bool = False
    """The times of a response are spread evenly over (0, 1) from a random start, instead of drawn one by one."""

    @property
    def passes(self) -> int:
        """Forward passes of a response: n."""
        return self.times * self.masks * (2 if self.paired else 1)

    def draw(self, responses: int, window: int, generator: torch.Generator) -> Masks:
        """Masks [B, n, R] for so many responses."""
        times_Bn = self.spread(torch.rand(responses, self.times, generator=generator))
        times_Bn = times_Bn.repeat_interleave(self.masks, dim=1)
        noise_BnR = torch.rand(*times_Bn.shape, window, generator=generator)
        if self.form == "count":
            return count_masks(times_Bn, noise_BnR, paired=self.paired)
        return bernoulli_masks(times_Bn, noise_BnR, paired=self.paired)

    def spread(self, noise_Bn: Tensor) -> Tensor:
        """Times in (0, 1) from noise that is uniform there; one each n-th of it where they are stratified."""
        return (noise_Bn[:, :1] + torch.arange(self.times)) / self.times if self.stratified else noise_Bn


def bernoulli_masks(times_Bn: Tensor, noise_BnR: Tensor, *, paired: bool, shortest: float = SHORTEST_TIME) -> Masks:
    """Each token is masked where its noise, uniform on (0, 1), is below the time.

    Uniform times are moved into (``shortest``, 1 - ``shortest``), which makes the mean wrong by about that fraction.
    The pair of a mask is its complement, whose tokens are masked with probability 1 - t.
    """
    times_Bn = shortest + (1 - 2 * shortest) * times_Bn
    masked_BnR = noise_BnR < times_Bn[..., None]
    if not paired:
        return Masks(masked_BnR, 1 / times_Bn)
    return Masks(torch.cat([masked_BnR, ~masked_BnR], 1), torch.cat([1 / times_Bn, 1 / (1 - times_Bn)], 1))


def count_masks(times_Bn: Tensor, noise_BnR: Tensor, *, paired: bool) -> Masks:
    """Exactly l of the R tokens are masked: the first l of a random order, l being uniform on 1..R.

    The pair of a mask is what the order has from its l-th token on: the complement and one token more, which makes
    R + 1 - l, as uniform as l. So the two mask every token, and one of them twice.
    """
    window = noise_BnR.shape[-1]
    count_Bn = (times_Bn * window).long().clamp(max=window - 1) + 1
    rank_BnR = noise_BnR.argsort(-1).argsort(-1)
    first_BnR = rank_BnR < count_Bn[..., None]
    if not paired:
        return Masks(first_BnR, window / count_Bn)
    rest_BnR = rank_BnR >= count_Bn[..., None] - 1
    counts_Bn = torch.cat([count_Bn, window + 1 - count_Bn], 1)
    return Masks(torch.cat([first_BnR, rest_BnR], 1), window / counts_Bn)


def elbo(model: MaskedModel, prompts_BP: Tensor, responses_BR: Tensor, masks: Masks) -> Tensor:
    """Estimated ELBO of each response, float32 (float64 for a float64 model) [B], in nats; differentiable.

    Every response goes through the model once a mask. Its log-probs come from hidden states and the head: the
    [B n R, V] logits are never held. Tokens that are not masked are ignored labels, which give 0 and no gradient.
    """
    B, n, R = masks.masked_BnR.shape
    hidden_BnRD = model(
        torch.cat(
            [
                prompts_BP.repeat_interleave(n, dim=0),
                responses_BR[:, None].masked_fill(masks.masked_BnR, model.mask).flatten(0, 1),
            ],
            dim=1,
        )
    )[:, -R:]
    labels_BnR = torch.where(masks.masked_BnR, responses_BR[:, None], IGNORED)
    logps_N = linear_logps(hidden_BnRD.flatten(0, 1), model.head, labels_BnR.flatten(), ignore_index=IGNORED)
    return (masks.weights_Bn * logps_N.view(B, n, R).sum(-1)).mean(1)


@torch.no_grad()
def elbo_values(model: MaskedModel, prompts_BP: Tensor, responses_BR: Tensor, masks: Masks) -> Tensor:
    """``elbo`` of any number of responses without a gradient, a part of them at a time."""
    size = max(1, _SEQUENCES // masks.masked_BnR.shape[1])
    parts = zip(*(tensor.split(size) for tensor in (prompts_BP, responses_BR, *masks)), strict=True)
    return torch.cat([elbo(model, prompts, responses, Masks(*rest)) for prompts, responses, *rest in parts])
