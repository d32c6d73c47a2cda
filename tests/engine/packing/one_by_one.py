"""What a packing invariance test compares: cases that hypothesis draws, how they are packed, and the same numbers from
transformers' own forward, one response after another, with losses written out in plain torch, all in float64.

Legend: G groups, K responses of a group, S responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import logsigmoid
from torch.overrides import TorchFunctionMode

from engine.config.losses import UNPAIRED_LOSSES
from engine.config.schema import LossConfig, PackingConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.model.attention import Backend, register_backends
from engine.model.layouts import eager_attention
from engine.model.load import disable_dropout
from engine.model.policy import Policy
from engine.packing import Pack, group_sizes, plan_epoch
from engine.train.feed import TrainingStep, build_pack
from engine.train.metrics import StepWork
from engine.train.objective import Objective
from engine.train.references import ReferenceTable
from tests.engine.model.families import VOCAB

BETA = 0.3
DESIRABLE = 0.7
"""Weight of desirable rows."""
TOLERANCE = 1e-10
"""Of the largest value that is compared. A pair that is lost, or weighs twice, is off by a sixth."""


class _InFloat64(TorchFunctionMode):
    """While it is entered, whatever would be cast to a smaller dtype is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(self._widened, args), **{name: self._widened(v) for name, v in (kwargs or {}).items()})

    @staticmethod
    def _widened(value: Any) -> Any:
        return torch.float64 if value is torch.float32 or value is torch.bfloat16 else value


class Float64Policy(Policy):
    """A policy whose model is in float64 where its own code asks for float32, too: in rotations, in the softmax, in
    recurrences. What the engine computes around it is as ever."""

    def __init__(self, model: nn.Module):
        register_backends()
        disable_dropout(model)
        # float32 here stands for no autocast.
        super().__init__(model.double(), backend=Backend("sdpa", "requested"), compute_dtype=torch.float32)

    def _run_body(self, *arguments: Any, **options: Any) -> Any:
        with _InFloat64():
            return super()._run_body(*arguments, **options)

    def plain_logits(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with _InFloat64():
            return super().plain_logits(*arguments, **options)


def examples(share: float) -> settings:
    """A share of the profile's number of examples; each takes about a tenth of a second."""
    return settings(max_examples=int(settings.default.max_examples * share))


@dataclass(frozen=True)
class Case:
    """Groups, and how they are packed."""

    dataset: PreferenceDataset
    table: ReferenceTable
    pairs_per_step: int
    tokens_per_pack: int
    share_prompts: bool
    ranks: int
    seed: int
    in_rows: bool = False
    """Whether the whole model runs on rows."""

    def __repr__(self) -> str:
        lengths = [n.tolist() for n in self.dataset.lengths]
        settings = {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        return f"Case(lengths={lengths}, {settings})"

    def plans(self) -> list[list[tuple[Pack, ...]]]:
        """Steps of each rank."""
        packing = PackingConfig(
            pairs_per_step=self.pairs_per_step,
            tokens_per_pack=self.tokens_per_pack,
            share_prompts=self.share_prompts,
            layout="rows" if self.in_rows else "auto",
        )
        plan = partial(plan_epoch, self.dataset.lengths, packing, seed=self.seed, ranks=self.ranks)
        return [plan(rank=rank) for rank in range(self.ranks)]

    def check_budget(self, pack: Pack) -> None:
        """The tokens of a pack, with the padding of its rows, are within the budget."""
        lengths = [self.dataset.lengths[i] for i in pack]
        if self.in_rows:
            size = sum(len(n) - 1 for n in lengths) * max((n[0] + n[1:].max() for n in lengths), default=0)
        else:
            size = group_sizes(lengths, share_prompts=self.share_prompts).sum()
        assert size <= self.tokens_per_pack

    def step(self, packs: Sequence[Pack], num_terms: int) -> TrainingStep:
        """What one rank does in a step of ``num_terms`` over all ranks."""
        built = tuple(
            build_pack(
                [self.dataset[i] for i in pack],
                torch.from_numpy(self.table.lookup(pack)),
                share_prompts=self.share_prompts,
            )
            for pack in packs
            if pack
        )
        return TrainingStep(1, 1.0, built, StepWork(num_terms, 0, 0, 0, 0.0))


@st.composite
def cases(
    draw,
    *,
    responses: st.SearchStrategy[int],
    ranks: st.SearchStrategy[int],
    distinct_tokens: bool = False,
    in_rows: bool = False,
    labelled: bool = False,
):
    """Prompts of 1 to 12 and responses of 1 to 9 tokens. Some groups repeat another one, or differ from it by their
    prompt alone; with ``distinct_tokens`` no two groups have a token in common. Of ``labelled`` groups the first
    response is desirable or not, and a second one another row's."""
    groups: list[PreferenceGroup] = []
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = st.integers(1, 9)
    for row in range(draw(st.integers(1, 6))):
        copied = (
            draw(st.sampled_from(["nothing", "group", "responses"])) if groups and not distinct_tokens else "nothing"
        )
        low, high = (20 * row, 20 * row + 20) if distinct_tokens else (0, VOCAB)

        def ids(size: int, low=low, high=high) -> np.ndarray:
            return generator.integers(low, high, size, dtype=np.int32)

        prompt = groups[-1].prompt_ids if copied == "group" else ids(draw(st.integers(1, 12)))
        if copied == "nothing":
            parts = tuple(ids(draw(length)) for _ in range(draw(responses)))
        else:
            parts = groups[-1].response_ids
        groups.append(PreferenceGroup(row, prompt, parts, desirable=draw(st.booleans()) if labelled else None))
    dataset = PreferenceDataset(groups)
    share = draw(st.booleans()) and not in_rows
    longest = int(group_sizes(dataset.lengths, share_prompts=share, in_rows=in_rows).max())
    sums = [tuple(float(-5 * len(r) + generator.normal()) for r in g.response_ids) for g in groups]
    return Case(
        dataset,
        ReferenceTable(sums),
        pairs_per_step=draw(st.integers(1, len(groups))),
        tokens_per_pack=longest + draw(st.sampled_from([0, 1, longest // 2, longest, 4 * longest])),
        share_prompts=share,
        ranks=draw(ranks),
        seed=draw(st.integers(0, 99)),
        in_rows=in_rows,
    )


class OneByOne(NamedTuple):
    """The model's own forward, a sequence at a time; differentiable."""

    tokens: list[list[torch.Tensor]]
    """Per group and response: log-prob of each token."""
    desirable: list[bool | None]
    """Per group: its label."""

    @classmethod
    def of(cls, policy: Policy, dataset: PreferenceDataset) -> OneByOne:

        def score(prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
            ids = torch.from_numpy(np.r_[prompt, response].astype(np.int64))
            start = len(prompt)
            logits = policy.plain_logits(ids[None])[0, start - 1 : -1]
            return logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]

        with eager_attention(policy):
            tokens = [[score(g.prompt_ids, r) for r in g.response_ids] for g in dataset]
        return cls(tokens, [g.desirable for g in dataset])

    def sums(self, group: int) -> torch.Tensor:
        """[K]."""
        return torch.stack([t.sum() for t in self.tokens[group]])


def plain_loss(name: str, alone: OneByOne, table: ReferenceTable, members: list[int]) -> torch.Tensor:
    """The loss of a step that holds ``members``, in float64."""
    ratios = [alone.sums(g) - torch.from_numpy(table.lookup((g,))).double() for g in members]
    if name == "plackett_luce":
        ranked = [BETA * r for r in ratios]
        return torch.stack([-sum(r[k] - r[k:].logsumexp(0) for k in range(len(r))) for r in ranked]).mean()
    if name in UNPAIRED_LOSSES:
        own = torch.stack([r[0] for r in ratios])
        # What is not to be learned from: the divergence.
        typical = torch.stack([r[1] for r in ratios]).mean().clamp(min=0).detach() if name == "kto" else 0.0
        signs = torch.tensor([1.0 if alone.desirable[g] else -1.0 for g in members], dtype=torch.float64)
        weights = torch.tensor([DESIRABLE if alone.desirable[g] else 1.0 for g in members], dtype=torch.float64)
        return (weights * torch.sigmoid(-signs * BETA * (own - typical))).mean()
    chosen, rejected = torch.stack(ratios).T
    if name == "sigmoid":
        return -logsigmoid(BETA * (chosen - rejected)).mean()
    if name == "ipo":
        means = torch.stack(
            [
                torch.stack([r[k] / len(alone.tokens[g][k]) for k in (0, 1)])
                for g, r in zip(members, ratios, strict=True)
            ]
        )
        return (means[:, 0] - means[:, 1] - 1 / (2 * BETA)).square().mean()
    if name == "aot_unpaired":
        return -logsigmoid(BETA * (chosen.sort().values - rejected.sort().values)).mean()
    assert name == "aot"
    sums = torch.stack([alone.sums(g) for g in members])
    refs = sums.detach() - torch.stack(ratios).detach()
    gaps, ref_gaps = ((t[:, 0] - t[:, 1]).sort().values for t in (sums, refs))
    return -logsigmoid(BETA * (gaps - ref_gaps)).mean()


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Of every parameter, which are then cleared."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in policy.causal_lm.named_parameters()}
    policy.zero_grad(set_to_none=True)
    return found


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Every gradient agrees within ``TOLERANCE`` of the largest one."""
    largest = max(t.abs().max() for t in want.values()).item()
    for name, expected in want.items():
        torch.testing.assert_close(
            got[name], expected, rtol=0, atol=TOLERANCE * max(largest, 1e-3), msg=lambda m, n=name: f"{n}: {m}"
        )


def check_case(case: Case, policy: Policy, loss: str) -> None:
    """Losses, log-probs and gradients of every step of a case are those of one response at a time."""
    sides = {"desirable_weight": DESIRABLE} if loss in UNPAIRED_LOSSES else {}
    objective = Objective(LossConfig(loss_type=loss, beta=BETA, **sides))
    objective.check_dataset(case.dataset)
    alone = OneByOne.of(policy, case.dataset)
    names, parameters = zip(*policy.causal_lm.named_parameters(), strict=True)
    plans = case.plans()
    seen: list[int] = []
    for parts in zip(*plans, strict=True):
        members = [i for packs in parts for pack in packs for i in pack]
        for pack in (pack for packs in parts for pack in packs):
            case.check_budget(pack)
        assert len({len(packs) for packs in parts}) == 1
        seen += members
        losses = []
        for packs in parts:
            step = case.step(packs, len(members))
            check_logps(policy, step, alone)
            if step.packs:
                losses.append(objective.backward(policy, step).losses)
        got = gradients(policy)
        expected = plain_loss(loss, alone, case.table, members)
        want = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
        total = sum(part.sum() for part in losses) / len(members)
        torch.testing.assert_close(total, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        close(
            got,
            {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, want, strict=True)},
        )
    assert sorted(seen) == list(range(len(case.dataset)))


def check_logps(policy: Policy, step: TrainingStep, alone: OneByOne) -> None:
    for pack in step.packs:
        others = pack.mismatched
        own, foreign = (slice(None), None) if others is None else (slice(1), slice(1, None))
        for batch, responses in ((pack.batch, own), *([(others.batch, foreign)] if others else [])):
            with torch.no_grad():
                got = policy.logps(batch)
            want = torch.cat([t for row in batch.rows for t in alone.tokens[row][responses]]).detach()
            torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
