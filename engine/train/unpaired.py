"""The losses of rows that are each desirable or not: KTO, and APO-zero of unpaired rows.

KTO measures rewards from an estimate of the divergence between policy and reference that is one number for a whole
step, so a pass without gradients over all of its mismatched completions comes first. Then every pack gives its own loss
and gradients, as for pairs whose losses are independent.

Legend: S responses, G rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import kto_divergence, kto_loss, linear_kto_loss
from dpo_kernels.chunks import sum_responses, to_device
from dpo_kernels.head import Head

from .. import mesh
from ..config.schema import LossConfig
from ..model import Policy
from ..packing import PackedBatch
from .feed import TrainingPack, TrainingStep
from .routing import Routing
from .scored import Scored

Reference = Callable[[PackedBatch, Tensor | None], Tensor | None]
"""fp32 [S], reference log-probs of a batch, from those that are stored."""


class UnpairedLoss:
    """The configured loss of unpaired rows.

    Args:
        stats: statistics of tokens that metrics are made of.
    """

    def __init__(self, config: LossConfig, stats: tuple[str, ...]):
        self.config = config
        self.stats = stats
        self.newest: Tensor | None = None
        """The divergence of the newest step."""

    def _options(self, divergence: Tensor | None) -> dict[str, Any]:
        c = self.config
        return {
            "loss_type": c.loss_type,
            "beta": c.beta,
            "desirable_weight": c.desirable_weight,
            "undesirable_weight": c.undesirable_weight,
            "divergence": divergence,
        }

    def backward(self, policy: Policy, step: TrainingStep, routing: Routing, reference: Reference) -> list[Scored]:
        """Add the gradients of a step's loss to the parameters; detached scores of its packs that count."""
        divergence = self.newest = self._divergence(policy, step, reference)
        routing.look_ahead(step.packs)
        scores = [self._backward_pack(pack, step, routing, reference, divergence) for pack in step.packs]
        return [scored for pack, scored in zip(step.packs, scores, strict=True) if pack.counts]

    def _divergence(self, policy: Policy, step: TrainingStep, reference: Reference) -> Tensor | None:
        """That of the whole step, over all processes; None for a loss without one."""
        if self.config.loss_type != "kto":
            return None
        training = policy.training
        # Adapters drop nothing out: the estimate is of the policy as it is.
        policy.eval()
        rows = [torch.zeros(0, 2, dtype=torch.float64, device=policy.device)]
        try:
            with torch.no_grad():
                for pack in step.packs:
                    assert pack.mismatched is not None
                    batch = pack.mismatched.batch
                    logps_S = sum_responses(policy.logps(batch), batch.lengths_S)
                    ref_S = reference(batch, pack.mismatched.ref_logps_S)
                    assert ref_S is not None
                    if pack.counts:
                        rows.append(torch.stack([logps_S, ref_S], 1).double())
        finally:
            policy.train(training)
        return kto_divergence(*torch.cat(mesh.concat_over_packs(torch.cat(rows))).unbind(1))

    def _backward_pack(
        self, pack: TrainingPack, step: TrainingStep, routing: Routing, reference: Reference, divergence: Tensor | None
    ) -> Scored:
        batch = pack.batch
        desirable_G = desirable_of(batch)
        ref_S = reference(batch, pack.ref_logps_S)
        assert ref_S is not None
        weights_G = batch.pair_weights_P if pack.counts else torch.zeros_like(ref_S)

        def objective(hidden_ND: Tensor, head: Head) -> Any:
            return linear_kto_loss(
                hidden_ND,
                head.weight_VD,
                batch.labels_N,
                batch.cu_responses_S1,
                ref_S,
                desirable_G,
                response_weights=weights_G,
                reduction="sum",
                stats=self.stats,
                **head.options,
                **self._options(divergence),
            )

        out, extra = routing.run(batch, objective, counts=pack.counts)
        loss = out.loss / step.num_terms
        (loss if extra is None else loss + extra.to(loss.dtype)).backward()
        stats_SK = torch.zeros(batch.num_responses, 0, device=ref_S.device)
        if out.stats:
            stats_SK = torch.stack([sum_responses(out.stats[name].float(), batch.lengths_S) for name in out.stats], 1)
        found = (out.response_losses, out.rewards, out.logps, to_device(desirable_G, ref_S.device))
        return self._scored(*found, divergence, stats_SK, batch.lengths_S)

    def score(
        self,
        logps_S: Tensor,
        ref_S: Tensor,
        lengths_S: Tensor,
        desirable_G: Tensor,
        weights_G: Tensor | None,
        stats_SK: Tensor,
    ) -> Scored:
        """The loss of whole rows, from the log-probs of their responses: for KTO the row's own one and another row's
        behind it."""
        K = len(logps_S) // max(1, len(desirable_G))
        divergence = kto_divergence(logps_S[1::K], ref_S[1::K]) if self.config.loss_type == "kto" else None
        out = kto_loss(logps_S[::K], ref_S[::K], desirable_G, **self._options(divergence))
        losses = out.loss if weights_G is None else out.loss * weights_G
        return self._scored(
            losses, out.rewards, logps_S[::K].detach(), desirable_G, divergence, stats_SK[::K], lengths_S[::K]
        )

    def _scored(
        self,
        losses: Tensor,
        rewards: Tensor,
        logps: Tensor,
        desirable_G: Tensor,
        divergence: Tensor | None,
        stats_GK: Tensor,
        lengths_G: Tensor,
    ) -> Scored:
        typical = 0.0 if divergence is None else self.config.beta * divergence
        right = torch.where(desirable_G, rewards > typical, rewards < typical).float()
        tokens = _token_columns(stats_GK, lengths_G, desirable_G)
        # A number for each row; columns() takes those of a label.
        return Scored(losses, rewards, rewards, right, logps, logps, tokens, desirable_G, divergence)


def desirable_of(batch: PackedBatch) -> Tensor:
    """bool [G], on the CPU: the labels of a batch of unpaired rows."""
    assert batch.desirable is not None
    return torch.tensor(batch.desirable)


def _token_columns(stats_GK: Tensor, lengths_G: Tensor, desirable_G: Tensor) -> Tensor:
    """As those of pairs (``Scored.tokens``), where a row has a chosen or a rejected response alone."""
    if not stats_GK.shape[1]:
        return stats_GK.double()
    entropy, logits, hits = stats_GK.double().unbind(1)
    good, bad = desirable_G.double(), (~desirable_G).double()
    n = lengths_G.double()
    return torch.stack([logits * good, logits * bad, entropy, hits * good, n * good, n * bad], 1)
