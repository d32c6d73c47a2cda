"""Training of the starting model by masked diffusion, then of preferences by DPO on ELBO estimates.

Legend: B pairs or dialogues of a step, R places of a response, S responses (chosen, then rejected).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo_kernels import PreferenceLoss, preference_loss

from .elbo import Masks, Sampler, elbo, elbo_values
from .language import WINDOW, Dialogues, Language, Pairs, batches
from .model import MaskedModel, Shape


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is written, trained and measured."""

    shape: Shape = field(default_factory=Shape)
    texts: int = 8000
    pairs: int = 512
    held_out: int = 96
    pretraining_steps: int = 1500
    pretraining_batch: int = 16
    pretraining_rate: float = 3e-3
    steps: int = 48
    pairs_per_step: int = 16
    learning_rate: float = 1e-4
    beta: float = 0.5
    eval_steps: int = 8
    samples: int = 64
    """Held-out prompts that both models answer."""
    measured_pairs: int = 16
    draws: int = 16
    """Estimates of each score whose variance is measured."""


LEARNING = Sampler(form="count", times=2, paired=True, stratified=True)
"""What preferences are learned with: 4 passes of each response."""
EVALUATION = Sampler(form="count", times=4, paired=True, stratified=True)
_PRETRAINING = Sampler(form="count", times=1, paired=True)


@dataclass(frozen=True)
class Evaluation:
    """Of a policy on held-out pairs, by ELBO estimates on masks that all evaluations share."""

    step: int
    ranking_accuracy: float
    """Share of pairs whose chosen response has the higher ELBO."""
    reward_accuracy: float
    """Share of pairs whose chosen response gained more over the reference; ties, as before training, count one half."""
    margin: float
    """Mean of ELBO gained by the chosen response less that gained by the rejected one, in nats."""
    loss: float
    """Mean DPO loss, in nats."""


def pretrain(language: Language, size: Size, seed: int) -> tuple[MaskedModel, list[float]]:
    """A starting model, and the loss of every step: minus the estimated ELBO, in nats per token of the window."""
    torch.manual_seed(seed)
    prompts_BP, responses_BR = language.text
    model = MaskedModel(
        len(language.tokenizer), prompts_BP.shape[1] + WINDOW, language.tokenizer.pad_token_id, size.shape
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.pretraining_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=size.pretraining_rate, total_steps=size.pretraining_steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for rows in batches(len(prompts_BP), size.pretraining_batch, size.pretraining_steps, generator):
        masks = _PRETRAINING.draw(len(rows), WINDOW, generator)
        loss = -elbo(model, prompts_BP[rows], responses_BR[rows], masks).mean() / WINDOW
        _update(model, loss, optimizer)
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses


def _update(model: MaskedModel, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def dpo_on_elbos(logps_S: Tensor, ref_logps_S: Tensor, beta: float) -> PreferenceLoss:
    """DPO with ELBOs for log-probs (LLaDA 1.5, arXiv 2505.19223) of all chosen, then all rejected responses."""
    return preference_loss(*logps_S.chunk(2), *ref_logps_S.chunk(2), beta=beta)


def preference_step(policy: MaskedModel, reference: MaskedModel, pairs: Pairs, masks: Masks, beta: float) -> Tensor:
    """Mean DPO loss of ``pairs`` under ``masks`` [2 B, n, R], which policy and reference share."""
    responses = pairs.responses()
    return dpo_on_elbos(elbo(policy, *responses, masks), elbo_values(reference, *responses, masks), beta).loss.mean()


def learn_preferences(
    reference: MaskedModel, language: Language, size: Size, seed: int
) -> tuple[MaskedModel, list[Evaluation], list[float]]:
    """The reference taught to prefer chosen responses; evaluations before, during and after, and every step's loss."""
    policy = copy.deepcopy(reference).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=size.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    held_out = Judge(language.held_out, reference, size.beta, seed)
    evaluations, losses = [held_out(policy, 0)], []
    for step, rows in enumerate(
        batches(len(language.pairs.prompts_BP), size.pairs_per_step, size.steps, generator), start=1
    ):
        masks = LEARNING.draw(2 * len(rows), WINDOW, generator)
        loss = preference_step(policy, reference, language.pairs.part(rows), masks, size.beta)
        _update(policy, loss, optimizer)
        losses.append(loss.item())
        if step % size.eval_steps == 0 or step == size.steps:
            evaluations.append(held_out(policy, step))
    return policy.eval(), evaluations, losses


class Judge:
    """Evaluates policies on pairs with the same masks each time, under which the reference is estimated once."""

    def __init__(self, pairs: Pairs, reference: MaskedModel, beta: float, seed: int):
        self.responses: Dialogues = pairs.responses()
        self.beta = beta
        generator = torch.Generator().manual_seed(seed)
        self.masks = EVALUATION.draw(len(self.responses.prompts_BP), WINDOW, generator)
        self.ref_logps_S = elbo_values(reference, *self.responses, self.masks)

    def __call__(self, policy: MaskedModel, step: int) -> Evaluation:
        logps_S = elbo_values(policy, *self.responses, self.masks)
        chosen, rejected = logps_S.chunk(2)
        gained_chosen, gained_rejected = (logps_S - self.ref_logps_S).chunk(2)
        return Evaluation(
            step=step,
            ranking_accuracy=_above(chosen, rejected),
            reward_accuracy=_above(gained_chosen, gained_rejected),
            margin=(gained_chosen - gained_rejected).mean().item(),
            loss=dpo_on_elbos(logps_S, self.ref_logps_S, self.beta).loss.mean().item(),
        )


def _above(high: Tensor, low: Tensor) -> float:
    return ((high > low).float() + 0.5 * (high == low)).mean().item()
