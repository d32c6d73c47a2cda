"""From the packs of one optimizer step to its loss and gradients.

The loss of a step is the sum over its pairs and rankings divided by their number, however they are packed and spread
over processes, whose gradients ``engine/model/shard.py`` sums. A group is one pair, one ranking, or the several pairs
of scored completions, each of which counts as any other. Ways that lead there:

- Pairs whose losses are independent: ``linear_dpo_loss`` on every pack, gradients accumulate (one pass).
- Losses that couple pairs (``aot``, ``aot_unpaired``): a first pass without gradients gives every log-prob of the step,
  the loss of the whole step gives d loss / d log-prob, and a second pass per pack carries it back. A step of one pack
  needs no first pass, unless other processes have packs, too.
- Rankings of K responses (``plackett_luce``): ``linear_logps`` on every pack, then the loss of whole groups. When every
  group of the step has two responses it is DPO, and computed as DPO to the bit.

- Several pairs of one group: ``linear_logps`` on every pack, each response once, then the loss of its pairs.
- Unpaired rows: see ``unpaired.py``.

To each of them ``engine/train/routing.py`` adds the load-balancing loss of a mixture of experts.

Legend: N completion tokens, S responses, G groups (or pairs of groups), P pairs, K responses of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import ld_token_weights, linear_dpo_loss, linear_logps, plackett_luce_loss, preference_loss
from dpo_kernels.chunks import sum_responses, to_device
from dpo_kernels.head import Head
from dpo_kernels.linear_logps.api import TokenLogps

from .. import distributed, mesh
from ..config.schema import LossConfig
from ..model import Policy
from ..packing import PackedBatch
from .feed import TrainingStep
from .routing import Routing, same_random_numbers
from .scored import PLAIN_TERMS, RowTerms, Scored
from .terms import LossTerms
from .unpaired import UnpairedLoss

TOKEN_STATS = ("entropy", "mean_logits", "is_top1")
"""Statistics of tokens that metrics are made of."""
TOKEN_COLUMNS = 6
"""Mean logits of chosen tokens and of rejected ones, entropies of both, hits among chosen ones, and their numbers."""
PAIR_LOSS = "sigmoid"
"""What ``RANKING_LOSS`` is for two responses."""


class Objective(LossTerms):
    """The configured loss.

    Args:
        live_reference: gives the reference log-probs (fp32 [S]) of a batch when they are not stored.
        token_metrics: gather the statistics of tokens that ``metrics.TOKEN_NAMES`` are made of.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        live_reference: Callable[[PackedBatch], Tensor] | None = None,
        token_metrics: bool = False,
    ):
        super().__init__(config)
        self.token_stats = TOKEN_STATS if token_metrics else ()
        self.live_reference = live_reference
        self.rows = UnpairedLoss(config, self.token_stats)
        self.routing: Routing | None = None
        """What the routers of a mixture did in the newest step."""

    @property
    def stats(self) -> tuple[str, ...]:
        """Statistics of tokens to gather: those of metrics, and what WPO weighs pairs by."""
        return (*self.token_stats, *(("log_sum_sq_probs",) if self.config.use_weighting else ()))

    def _options(self) -> dict[str, Any]:
        c = self.config
        return {
            "loss_type": PAIR_LOSS if self.ranks else tuple(c.terms),
            "loss_weights": None if self.ranks else tuple(c.terms.values()),
            "beta": c.beta,
            "label_smoothing": c.label_smoothing,
            "discopop_tau": c.discopop_tau,
            "simpo_gamma": c.simpo_gamma,
            "cpo_alpha": c.cpo_alpha,
            "dpop_lambda": c.dpop_lambda,
            "shift_lambda": c.shift_lambda,
            "f_divergence_type": c.f_divergence_type,
            "f_alpha_divergence_coef": c.f_alpha_divergence_coef,
        }

    def reference(self, batch: PackedBatch, stored_S: Tensor | None) -> Tensor | None:
        """fp32 [S], or None for a loss without a reference."""
        if stored_S is None and self.live_reference is not None:
            return self.live_reference(batch)
        return stored_S

    def token_weights(self, batch: PackedBatch) -> Tensor | None:
        """fp32 [N]: what log-probs of tokens are multiplied by before they are summed; None for nothing."""
        if self.ld_alpha is None:
            return batch.token_weights_N
        weights_N = to_device(ld_token_weights(batch.cu_responses_S1, self.ld_alpha), batch.labels_N.device)
        return weights_N if batch.token_weights_N is None else weights_N * batch.token_weights_N

    def response_logps(self, logps_N: Tensor, batch: PackedBatch) -> Tensor:
        """fp32 [S], from the log-probs of tokens."""
        weights_N = self.token_weights(batch)
        return sum_responses(logps_N if weights_N is None else logps_N * weights_N, batch.lengths_S)

    def score_responses(
        self, routing: Routing, batch: PackedBatch, *, counts: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(fp32 [S], log-probs; [S, K], sums of statistics of tokens; what ``routing`` adds to the loss), in one
        product. With weights of tokens the last column of sums has the log-probs without them, differentiable, too."""
        out, extra = routing.run(batch, lambda hidden, head: self._token_logps(hidden, head, batch), counts=counts)
        logps_S, sums_SK = self.response_logps(out.logps, batch), self._sums(out.stats, batch)
        if self.token_weights(batch) is not None:
            sums_SK = torch.cat([sums_SK, sum_responses(out.logps, batch.lengths_S)[:, None]], 1)
        return logps_S, sums_SK, extra

    def unweighted(self, logps_S: Tensor, sums_SK: Tensor) -> Tensor:
        """Log-probs of responses without weights of tokens, from what ``score_responses`` gives."""
        return sums_SK[:, -1] if sums_SK.shape[1] > len(self.stats) else logps_S

    def _token_logps(self, hidden_ND: Tensor, head: Head, batch: PackedBatch) -> TokenLogps:
        labels = batch.own_labels
        own = linear_logps(hidden_ND, head.weight_VD, labels, stats=self.stats, **head.options)
        if batch.own is None:
            return own
        columns = batch.collect(torch.stack([own.logps, *(own.stats[name].float() for name in own.stats)], 1))
        return TokenLogps(columns[:, 0], dict(zip(own.stats, columns[:, 1:].detach().unbind(1), strict=True)))

    def _sums(self, stats: Mapping[str, Tensor], batch: PackedBatch) -> Tensor:
        """[S, K] over the tokens of each response, of the statistics that are there."""
        sums = [sum_responses(stats[name].float(), batch.lengths_S) for name in stats]
        return torch.stack(sums, 1) if sums else torch.zeros(batch.num_responses, 0, device=batch.labels_N.device)

    def score(
        self,
        logps_S: Tensor,
        ref_S: Tensor | None,
        lengths_S: Tensor,
        per_group: tuple[int, ...],
        terms: RowTerms = PLAIN_TERMS,
        *,
        sums_SK: Tensor | None = None,
        mean_chosen_length: float | None = None,
    ) -> Scored:
        """Loss and rewards of whole groups from the log-probs of their responses; differentiable in ``logps_S``.

        Args:
            logps_S, ref_S: fp32 [S].
            lengths_S: completion tokens of each response.
            per_group: responses of each group.
            terms: the pairs, where groups are not one each, and numbers of rows.
            sums_SK: as ``score_responses`` gives them; None where nothing of it is asked for.
            mean_chosen_length: of the whole step, when this is a part of it.
        """
        sums_SK = logps_S.new_zeros(len(logps_S), 0) if sums_SK is None else sums_SK
        stats_SK = sums_SK[:, : len(self.token_stats)].detach()
        if self.unpaired:
            assert ref_S is not None
            assert terms.desirable_G is not None
            return self.rows.score(logps_S, ref_S, lengths_S, terms.desirable_G, terms.weights_P, stats_SK)
        if self.ranks:
            assert ref_S is not None
            return _weighted(self._score_rankings(logps_S, ref_S, lengths_S, per_group, stats_SK), terms.weights_P)

        def sides(values_S: Tensor | None) -> tuple[Any, Any]:
            if values_S is None:
                return None, None
            if terms.pairs_P2 is None:
                return _sides(values_S)
            return values_S[terms.pairs_P2[:, 0]], values_S[terms.pairs_P2[:, 1]]

        (chosen, rejected), lengths = sides(logps_S), sides(lengths_S)
        unweighted_S = self.unweighted(logps_S, sums_SK)
        out = preference_loss(
            chosen,
            rejected,
            *sides(ref_S),
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            mean_chosen_length=mean_chosen_length,
            unweighted_chosen_logps=sides(unweighted_S)[0],
            margins=terms.margins_P,
            **self._options(),
        )
        losses = out.loss
        if self.config.use_weighting:
            losses = losses * torch.stack(sides(self._confidence(unweighted_S, sums_SK, lengths_S))).prod(0)
        tokens = _token_columns(sides(stats_SK), lengths)
        logps = (chosen.detach(), rejected.detach())
        scored = _scored_pairs(losses, out.chosen_rewards, out.rejected_rewards, *logps, tokens)
        return _weighted(scored, terms.weights_P)

    def _confidence(self, unweighted_S: Tensor, sums_SK: Tensor, lengths_S: Tensor) -> Tensor:
        """[S], detached: e^(mean over tokens of log p - log sum p^2). WPO, Zhou et al. 2024, arXiv 2406.11827."""
        log_squares_S = sums_SK[:, len(self.token_stats)]
        return ((unweighted_S - log_squares_S).detach() / lengths_S.clamp(min=1)).exp()

    def _score_rankings(
        self,
        logps_S: Tensor,
        ref_S: Tensor,
        lengths_S: Tensor,
        per_group: tuple[int, ...],
        sums_SK: Tensor,
    ) -> Scored:
        starts = torch.tensor([0, *per_group]).cumsum(0)[:-1]
        parts: list[tuple[Tensor, Scored]] = []
        for k in sorted(set(per_group)):
            groups = torch.tensor([g for g, size in enumerate(per_group) if size == k])
            rows = to_device(starts[groups, None] + torch.arange(k), logps_S.device)
            logps_BK = logps_S[rows]
            out = plackett_luce_loss(logps_BK, ref_S[rows], beta=self.config.beta)
            best, rest, rewards = out.rewards[:, 0], out.rewards[:, 1:].mean(1), out.rewards
            better, worse = torch.triu_indices(k, k, 1, device=rewards.device)
            right = (rewards[:, better] > rewards[:, worse]).float().mean(1)
            logps = logps_BK.detach()
            best_and_rest = ((t[rows][:, 0], t[rows][:, 1:].sum(1)) for t in (sums_SK, lengths_S))
            tokens = _token_columns(*best_and_rest)
            parts.append((groups, Scored(out.loss, best, rest, right, logps[:, 0], logps[:, 1:].mean(1), tokens)))
        order = to_device(torch.cat([groups for groups, _ in parts]).argsort(), logps_S.device)
        return Scored(*(torch.cat(columns)[order] for columns in zip(*(s[:7] for _, s in parts), strict=True)))

    def backward(self, policy: Policy, step: TrainingStep) -> Scored:
        """Add the gradients of the step's loss to the parameters.

        Returns:
            Detached scores of what this process did, in pack order.
        """
        scored = self._backward(policy, step)
        policy.sum_gradients()
        return scored

    def _backward(self, policy: Policy, step: TrainingStep) -> Scored:
        self.routing = Routing(policy, self.config, count_experts=True)
        if self.unpaired:
            rows = self.rows.backward(policy, step, self.routing, self.reference)
            return _concatenated(rows) if rows else self._nothing(policy.device)
        if self.couples_pairs and (len(step.packs) > 1 or distributed.size() > 1):
            return self._backward_coupled(policy, step, self.routing)
        self.routing.look_ahead(step.packs)
        fused = not (self.couples_pairs or self.config.use_weighting or mesh.context_size() > 1) and all(
            k == 2 for p in step.packs for k in p.batch.responses_per_group
        )
        one_pass = self._backward_pairs if fused else self._backward_logps
        scores = one_pass(policy, step, self.routing)
        counted = [scored for pack, scored in zip(step.packs, scores, strict=True) if pack.counts]
        return _concatenated(counted) if counted else self._nothing(policy.device)

    def _nothing(self, device: torch.device) -> Scored:
        """No group at all."""
        none = torch.zeros(0, device=device)
        tokens = none.new_zeros(0, TOKEN_COLUMNS if self.token_stats else 0, dtype=torch.float64)
        found = Scored(none, none, none, none, none, none, tokens)
        return found._replace(desirable=none.bool(), divergence=self.rows.newest) if self.unpaired else found

    def _backward_pairs(self, policy: Policy, step: TrainingStep, routing: Routing) -> list[Scored]:
        options = self._options()
        options["mean_chosen_length"] = self._mean_chosen_length(step)
        parts = []
        for pack in step.packs:
            batch, ref_S = pack.batch, self.reference(pack.batch, pack.ref_logps_S)
            weights_P = batch.pair_weights_P if pack.counts else torch.zeros(batch.num_groups, device=policy.device)
            weights_N = self.token_weights(batch)

            def objective(
                hidden_ND: Tensor, head: Head, batch=batch, ref_S=ref_S, weights_P=weights_P, weights_N=weights_N
            ):
                return linear_dpo_loss(
                    hidden_ND,
                    head.weight_VD,
                    batch.labels_N,
                    batch.cu_responses_S1,
                    ref_S,
                    pair_weights=weights_P,
                    token_weights=weights_N,
                    margins=batch.margins_P,
                    reduction="sum",
                    stats=self.token_stats,
                    **head.options,
                    **options,
                )

            out, extra = routing.run(batch, objective, counts=pack.counts)
            _plus(out.loss / step.num_terms, extra).backward()
            tokens = _token_columns(_sides(self._sums(out.stats, batch)), _sides(batch.lengths_S))
            rewards = (out.chosen_rewards, out.rejected_rewards)
            scored = _scored_pairs(out.pair_losses, *rewards, *_sides(out.logps), tokens)
            parts.append(_weighted(scored, batch.pair_weights_P))
        return parts

    def _mean_chosen_length(self, step: TrainingStep) -> float | None:
        """Tokens of a chosen response over all pairs of the step, for losses that ask for it."""
        if "sft" not in self.config.loss_types:
            return None
        tokens = sum(p.batch.num_chosen_tokens for p in step.packs if p.counts)
        return sum(mesh.gather(tokens)) / step.num_terms

    def _backward_logps(self, policy: Policy, step: TrainingStep, routing: Routing) -> list[Scored]:
        parts = []
        mean_length = self._mean_chosen_length(step)
        for pack in step.packs:
            batch = pack.batch
            ref_S = self.reference(batch, pack.ref_logps_S)
            logps_S, sums_SK, extra = self.score_responses(routing, batch, counts=pack.counts)
            scored = self.score(
                logps_S,
                ref_S,
                batch.lengths_S,
                batch.responses_per_group,
                RowTerms.of(batch),
                sums_SK=sums_SK,
                mean_chosen_length=mean_length,
            )
            _plus(scored.losses.sum() * (pack.counts / step.num_terms), extra).backward()
            parts.append(scored._replace(losses=scored.losses.detach()))
        return parts

    def _backward_coupled(self, policy: Policy, step: TrainingStep, routing: Routing) -> Scored:
        packs = step.packs
        with same_random_numbers(policy.device), torch.no_grad():
            scores = [self.score_responses(routing, p.batch, counts=p.counts) for p in packs]
        routing.close_first_pass()
        sums, token_sums, _ = zip(*scores, strict=True)
        refs = [self.reference(p.batch, p.ref_logps_S) for p in packs]
        terms = zip(sums, refs, packs, strict=True)
        rows = [_coupled_rows(logps, ref, pack.batch) for logps, ref, pack in terms if pack.counts]
        parts = mesh.concat_over_packs(torch.cat([torch.zeros(0, 3, device=policy.device).double(), *rows]))
        step_S3 = torch.cat(parts)
        logps_S, ref_S, lengths_S = (column.to(sums[0].dtype) for column in step_S3.T)
        logps_S.requires_grad_()
        scored = self.score(logps_S, ref_S if self.needs_reference else None, lengths_S, (2,) * step.num_terms)
        (slopes_S,) = torch.autograd.grad(scored.losses.sum() / step.num_terms, logps_S)
        first = sum(len(part) for part in parts[: mesh.data_rank()])
        start = first
        for pack in packs:
            stop = start + pack.batch.num_responses if pack.counts else start
            slopes = slopes_S[start:stop] if pack.counts else slopes_S.new_zeros(pack.batch.num_responses)
            logps_N, extra = routing.run(pack.batch, policy.logps_of(pack.batch), counts=pack.counts)
            logps_S = self.response_logps(logps_N, pack.batch)
            _plus((logps_S * slopes).sum(), extra).backward()
            start = stop
        own = scored.map_columns(lambda column: column.detach()[first // 2 : start // 2])
        counted = ((p.batch, s) for p, s in zip(packs, token_sums, strict=True) if p.counts)
        K = len(self.token_stats)
        tokens = [_token_columns(_sides(s[:, :K]), _sides(batch.lengths_S)) for batch, s in counted]
        return own._replace(tokens=torch.cat([self._nothing(policy.device).tokens, *tokens]))


def _coupled_rows(logps_S: Tensor, ref_S: Tensor | None, batch: PackedBatch) -> Tensor:
    """float64 [S, 3]: log-prob, reference (0 without one) and length of each response."""
    columns = (logps_S, torch.zeros_like(logps_S) if ref_S is None else ref_S, batch.lengths_S)
    return torch.stack([column.double() for column in columns], 1)


def _scored_pairs(
    losses: Tensor, chosen: Tensor, rejected: Tensor, logps_w: Tensor, logps_l: Tensor, tokens: Tensor
) -> Scored:
    return Scored(losses, chosen, rejected, (chosen > rejected).float(), logps_w, logps_l, tokens)


def _weighted(scored: Scored, weights_P: Tensor | None) -> Scored:
    """With losses multiplied by weights of pairs or rankings."""
    return scored if weights_P is None else scored._replace(losses=scored.losses * weights_P)


def _sides(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """Those of chosen and of rejected responses, which alternate."""
    return values_S[0::2], values_S[1::2]


def _token_columns(sums: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]) -> Tensor:
    """float64 [G, TOKEN_COLUMNS], or [G, 0], from the sums [G, K] and the lengths [G] of chosen and rejected."""
    if not sums[0].shape[1]:
        return sums[0].double()
    (entropy, logits, hits), (other_entropy, other_logits, _) = (side.double().unbind(1) for side in sums)
    return torch.stack([logits, other_logits, entropy + other_entropy, hits, *(n.double() for n in lengths)], 1)


def _concatenated(parts: list[Scored]) -> Scored:
    if len(parts) == 1:
        return parts[0]
    following = iter(zip(*(part.tensors for part in parts), strict=True))
    return parts[0].map_columns(lambda _: torch.cat(next(following)))


def _plus(loss: Tensor, extra: Tensor | None) -> Tensor:
    return loss if extra is None else loss + extra.to(loss.dtype)
