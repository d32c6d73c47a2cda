"""Packing never changes the maths: whatever the lengths, the budget, the split of an epoch into steps and the number of
ranks, loss, every log-prob and every gradient are those of one sequence at a time.

The other side is transformers' own forward, one response after another, and losses written out in plain torch. The
models are tiny and in float64 throughout, so that nothing hides behind rounding: ``gpt2`` with eager attention, and
``starcoder2`` (rotary positions, grouped heads, a window shorter than the sequences) with ``sdpa``, because its eager
attention rounds the softmax to float32.

Legend: G groups, K responses of a group, S responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from engine.config.schema import LossConfig, PackingConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.model.attention import Backend, register_backends
from engine.model.policy import Policy
from engine.packing import Pack, build_batch, group_sizes, plan_epoch
from engine.train.feed import TrainingPack, TrainingStep
from engine.train.metrics import StepWork
from engine.train.objective import Objective
from engine.train.references import ReferenceTable
from tests.engine.model.families import VOCAB, WINDOW, tiny_model

pytestmark = pytest.mark.property

BETA = 0.3
TOLERANCE = 1e-10
"""Of the largest value that is compared. A pair that is lost, or weighs twice, is off by a sixth."""
PLAIN_ATTENTION = {"gpt2": "eager", "starcoder2": "sdpa"}
OPTIONS: dict[str, dict] = {"gpt2": {}, "starcoder2": {"sliding_window": WINDOW}}


def examples(share: float) -> settings:
    """A share of the profile's number of examples; each takes about a tenth of a second."""
    return settings(max_examples=int(settings.default.max_examples * share))


@cache
def make_policy(family: str) -> Policy:
    register_backends()
    backend = Backend("sdpa", "requested")
    model = tiny_model(family, tie_word_embeddings=False, **OPTIONS[family]).double()
    # float32 here stands for no autocast.
    return Policy(model, backend=backend, compute_dtype=torch.float32)


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
        )
        plan = partial(plan_epoch, self.dataset.lengths, packing, seed=self.seed, ranks=self.ranks)
        return [plan(rank=rank) for rank in range(self.ranks)]

    def step(self, packs: Sequence[Pack], num_terms: int) -> TrainingStep:
        """What one rank does in a step of ``num_terms`` over all ranks."""
        built = tuple(
            TrainingPack(
                build_batch([self.dataset[i] for i in pack], share_prompts=self.share_prompts),
                torch.from_numpy(self.table.lookup(pack)),
            )
            for pack in packs
            if pack
        )
        return TrainingStep(1, 1.0, built, StepWork(num_terms, 0, 0, 0, 0.0))


@st.composite
def cases(draw, *, responses: st.SearchStrategy[int], ranks: st.SearchStrategy[int], distinct_tokens: bool = False):
    """Prompts of 1 to 12 and responses of 1 to 9 tokens. Some groups repeat another one, or differ from it by their
    prompt alone; with ``distinct_tokens`` no two groups have a token in common."""
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
        groups.append(PreferenceGroup(row, prompt, parts))
    dataset = PreferenceDataset(groups)
    share = draw(st.booleans())
    longest = int(group_sizes(dataset.lengths, share_prompts=share).max())
    sums = [tuple(float(-5 * len(r) + generator.normal()) for r in g.response_ids) for g in groups]
    return Case(
        dataset,
        ReferenceTable(sums),
        pairs_per_step=draw(st.integers(1, len(groups))),
        tokens_per_pack=longest + draw(st.sampled_from([0, 1, longest // 2, longest, 4 * longest])),
        share_prompts=share,
        ranks=draw(ranks),
        seed=draw(st.integers(0, 99)),
    )


class OneByOne(NamedTuple):
    """The model's own forward, a sequence at a time; differentiable."""

    tokens: list[list[torch.Tensor]]
    """Per group and response: log-prob of each token."""

    @classmethod
    def of(cls, policy: Policy, dataset: PreferenceDataset) -> OneByOne:
        model = policy.causal_lm
        model.set_attn_implementation(PLAIN_ATTENTION[model.config.model_type])

        def score(prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
            ids = torch.from_numpy(np.r_[prompt, response].astype(np.int64))
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
            start = len(prompt)
            return logits[start - 1 : -1].log_softmax(-1).gather(1, ids[start:, None])[:, 0]

        try:
            return cls([[score(g.prompt_ids, r) for r in g.response_ids] for g in dataset])
        finally:
            model.set_attn_implementation(policy.backend.implementation)

    def sums(self, group: int) -> torch.Tensor:
        """[K]."""
        return torch.stack([t.sum() for t in self.tokens[group]])


def plain_loss(name: str, alone: OneByOne, table: ReferenceTable, members: list[int]) -> torch.Tensor:
    """The loss of a step that holds ``members``, in float64."""
    ratios = [alone.sums(g) - torch.from_numpy(table.lookup((g,))).double() for g in members]
    if name == "plackett_luce":
        ranked = [BETA * r for r in ratios]
        return torch.stack([-sum(r[k] - r[k:].logsumexp(0) for k in range(len(r))) for r in ranked]).mean()
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


def check_case(case: Case, family: str, loss: str) -> None:
    policy = make_policy(family)
    objective = Objective(LossConfig(loss_type=loss, beta=BETA))
    objective.check_dataset(case.dataset)
    alone = OneByOne.of(policy, case.dataset)
    names, parameters = zip(*policy.causal_lm.named_parameters(), strict=True)
    plans = case.plans()
    sizes = group_sizes(case.dataset.lengths, share_prompts=case.share_prompts)
    seen: list[int] = []
    for parts in zip(*plans, strict=True):
        members = [i for packs in parts for pack in packs for i in pack]
        assert all(sizes[list(pack)].sum() <= case.tokens_per_pack for packs in parts for pack in packs)
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
        with torch.no_grad():
            got = policy.logps(pack.batch)
        want = torch.cat([t for row in pack.batch.rows for t in alone.tokens[row]]).detach()
        torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


pairs = st.just(2)
few = st.integers(1, 3)
families = pytest.mark.parametrize("family", ["gpt2", "starcoder2"])


@families
@examples(0.4)
@given(case=cases(responses=pairs, ranks=few), loss=st.sampled_from(["sigmoid", "ipo"]))
def test_pairs(family, case, loss):
    check_case(case, family, loss)


@families
@examples(0.3)
@given(case=cases(responses=st.integers(2, 5), ranks=few))
def test_rankings(family, case):
    check_case(case, family, "plackett_luce")


@families
@examples(0.3)
@given(case=cases(responses=pairs, ranks=st.just(1)), loss=st.sampled_from(["aot", "aot_unpaired"]))
def test_coupled_pairs_are_computed_over_the_whole_step(family, case, loss):
    check_case(case, family, loss)


def run_packs(case: Case, packs: Sequence[Pack], loss: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over all groups, packed as told."""
    policy = make_policy("gpt2")
    scored = Objective(LossConfig(loss_type=loss, beta=BETA)).backward(policy, case.step(packs, len(case.dataset)))
    return scored.losses.sum() / len(case.dataset), gradients(policy)


@examples(0.4)
@given(
    data=st.data(),
    case=cases(responses=pairs, ranks=st.just(1)),
    loss=st.sampled_from(["sigmoid", "aot", "plackett_luce"]),
)
def test_any_division_into_packs_in_any_order(data, case, loss):
    order = data.draw(st.permutations(range(len(case.dataset))))
    ends = [i for i in range(1, len(order)) if data.draw(st.booleans())]
    packs = [tuple(order[a:b]) for a, b in pairwise([0, *ends, len(order)])]
    loss_of_packs, got = run_packs(case, packs, loss)
    loss_of_one, want = run_packs(case, [tuple(range(len(order)))], loss)
    torch.testing.assert_close(loss_of_packs, loss_of_one, rtol=TOLERANCE, atol=TOLERANCE)
    close(got, want)


@examples(0.3)
@given(case=cases(responses=pairs, ranks=few, distinct_tokens=True))
def test_every_pair_counts_once_with_equal_weight(case):
    """No two pairs share a token here, so the rows of the input embedding tell whose gradient is whose."""
    policy = make_policy("gpt2")
    objective = Objective(LossConfig(beta=BETA))

    def embedding_gradients(packs: Sequence[Pack], num_terms: int) -> list[torch.Tensor]:
        objective.backward(policy, case.step(packs, num_terms))
        return list(gradients(policy)["transformer.wte.weight"].split(20))

    groups = range(len(case.dataset))
    alone = [embedding_gradients([(g,)], 1) for g in groups]
    for parts in zip(*case.plans(), strict=True):
        members = [i for packs in parts for pack in packs for i in pack]
        per_rank = [embedding_gradients(packs, len(members)) for packs in parts if any(packs)]
        for g in groups:
            weight = 1 / len(members) if g in members else 0
            want = weight * alone[g][g]
            torch.testing.assert_close(sum(rank[g] for rank in per_rank), want, rtol=1e-9, atol=1e-12)


@examples(0.3)
@given(data=st.data(), case=cases(responses=st.integers(2, 5), ranks=st.just(1)))
def test_a_response_does_not_see_the_others(data, case):
    policy = make_policy("gpt2")
    groups = list(case.dataset)
    g = data.draw(st.integers(0, len(groups) - 1))
    k = data.draw(st.integers(0, len(groups[g].response_ids) - 1))

    def logps(members: list[PreferenceGroup]) -> list[torch.Tensor]:
        batch = build_batch(members, share_prompts=case.share_prompts)
        with torch.no_grad():
            return list(policy.logps(batch).split(batch.cu_responses_S1.diff().tolist()))

    before = logps(groups)
    responses = list(groups[g].response_ids)
    responses[k] = (responses[k] + 1) % VOCAB
    groups[g] = replace(groups[g], response_ids=tuple(responses))
    after = logps(groups)
    changed = sum(len(group.response_ids) for group in groups[:g]) + k
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
        s == changed for s in range(len(before))
    ]


def test_a_coupled_loss_is_another_one_per_pack():
    """What the step-wide computation guards against shows in these numbers."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, VOCAB, 6, dtype=np.int32) for _ in range(12)]
    dataset = PreferenceDataset(
        [PreferenceGroup(g, *ids[3 * g : 3 * g + 1], tuple(ids[3 * g + 1 : 3 * g + 3])) for g in range(4)]
    )
    case = Case(dataset, ReferenceTable([(-30.0 - g, -33.0 + 2 * g) for g in range(4)]), 4, 36, True, 1, 0)
    packs = [(0, 1), (2, 3)]
    whole, _ = run_packs(case, packs, "aot")
    apart = sum(run_packs(case, [pack], "aot")[0] for pack in packs)
    assert abs(whole - apart) > 1e-3
