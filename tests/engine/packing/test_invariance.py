"""Packing never changes the maths: whatever the lengths, the budget, the split of an epoch into steps and the number of
ranks, loss, every log-prob and every gradient are those of one sequence at a time.

The models are tiny and in float64 throughout, so that nothing hides behind rounding. On packs: ``gpt2``, and
``starcoder2`` (rotary positions, grouped heads, a window shorter than the sequences). With mixers in rows and whole in
rows: a gated delta net, a Mamba 2 hybrid, short convolutions and an xLSTM, whose recurrences take several chunks a row;
and in rows alone ``bloom``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.schema import LossConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.model.checks import check_packing
from engine.model.layouts import use_layout
from engine.model.policy import Layout, Policy
from engine.packing import Pack, build_batch
from engine.packing.rows import BLOCK_COST
from engine.train.objective import Objective
from engine.train.references import ReferenceTable
from tests.conformance import families as all_families
from tests.engine.model.families import VOCAB, WINDOW, tiny_model
from tests.engine.packing.one_by_one import (
    BETA,
    TOLERANCE,
    Case,
    Float64Policy,
    cases,
    check_case,
    close,
    examples,
    gradients,
)

pytestmark = pytest.mark.property

OPTIONS: dict[str, dict] = {"gpt2": {}, "starcoder2": {"sliding_window": WINDOW}}
LAYOUTS = [
    *((family, kind) for family in ("qwen3_5_text", "bamba", "lfm2", "xlstm") for kind in ("mixers", "rows")),
    *(("bloom", kind) for kind in ("rows", "single")),
]
CHUNK = 4
"""Tokens that a recurrence takes at once: rows of these tests are of 2 to 21."""


@cache
def make_policy(family: str) -> Policy:
    return Float64Policy(tiny_model(family, tie_word_embeddings=False, **OPTIONS[family]))


@cache
def layout_policy(family: str) -> tuple[Policy, Layout]:
    """A policy that may take each of the layouts, and the one that the start-up check found."""
    config = all_families.tiny_config(family)
    for name in vars(config).keys() & {"chunk_size", "mamba_chunk_size"}:
        setattr(config, name, CHUNK)
    policy = Float64Policy(all_families.tiny_model(config))
    check_packing(policy)
    return policy, policy.layout


@contextmanager
def layout(family: str, kind: str, block_cost: int) -> Iterator[Policy]:
    """The policy of a family in a layout, with rows in many small blocks or in few large ones."""
    policy, found = layout_policy(family)
    use_layout(policy, found if found.kind == kind else Layout(kind))
    code = inspect.getmodule(type(policy.causal_lm))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.packing.rows.BLOCK_COST", block_cost)
        if (rule := getattr(code, "torch_chunk_gated_delta_rule", None)) is not None:
            patch.setattr(code, "torch_chunk_gated_delta_rule", partial(rule, chunk_size=CHUNK))
        yield policy


pairs = st.just(2)
few = st.integers(1, 3)
block_costs = st.sampled_from([0, 8, BLOCK_COST])
families = pytest.mark.parametrize("family", ["gpt2", "starcoder2"])


@families
@examples(0.4)
@given(case=cases(responses=pairs, ranks=few), loss=st.sampled_from(["sigmoid", "ipo"]))
def test_pairs(family, case, loss):
    check_case(case, make_policy(family), loss)


@families
@examples(0.3)
@given(case=cases(responses=st.integers(2, 5), ranks=few))
def test_rankings(family, case):
    check_case(case, make_policy(family), "plackett_luce")


@families
@examples(0.3)
@given(case=cases(responses=pairs, ranks=st.just(1)), loss=st.sampled_from(["aot", "aot_unpaired"]))
def test_coupled_pairs_are_computed_over_the_whole_step(family, case, loss):
    check_case(case, make_policy(family), loss)


@families
@examples(0.3)
@given(
    case=cases(responses=pairs, ranks=st.just(1), labelled=True),
    loss=st.sampled_from(["kto", "apo_zero_unpaired"]),
)
def test_unpaired_rows(family, case, loss):
    check_case(case, make_policy(family), loss)


def run_packs(
    policy: Policy, case: Case, packs: Sequence[Pack], loss: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over all groups, packed as told."""
    scored = Objective(LossConfig(loss_type=loss, beta=BETA)).backward(policy, case.step(packs, len(case.dataset)))
    return scored.losses.sum() / len(case.dataset), gradients(policy)


@examples(0.4)
@given(
    data=st.data(),
    case=cases(responses=pairs, ranks=st.just(1)),
    loss=st.sampled_from(["sigmoid", "aot", "plackett_luce"]),
)
def test_any_division_into_packs_in_any_order(data, case, loss):
    check_division(data, case, make_policy("gpt2"), loss)


def check_division(data: st.DataObject, case: Case, policy: Policy, loss: str) -> None:
    """One step over all groups is the same however these are divided into packs."""
    order = data.draw(st.permutations(range(len(case.dataset))))
    ends = [i for i in range(1, len(order)) if data.draw(st.booleans())]
    packs = [tuple(order[a:b]) for a, b in pairwise([0, *ends, len(order)])]
    loss_of_packs, got = run_packs(policy, case, packs, loss)
    loss_of_one, want = run_packs(policy, case, [tuple(range(len(order)))], loss)
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
    check_isolation(data, case, make_policy("gpt2"))


def check_isolation(data: st.DataObject, case: Case, policy: Policy) -> None:
    """Another response changes no bit."""
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


@pytest.mark.parametrize(("family", "kind"), LAYOUTS)
@examples(0.03)
@given(data=st.data(), loss=st.sampled_from(["sigmoid", "ipo", "aot", "plackett_luce"]), block_cost=block_costs)
def test_all_of_it_in_other_layouts(family, kind, data, loss, block_cost):
    in_rows = kind in ("rows", "single")
    responses = st.integers(2, 4) if loss == "plackett_luce" else pairs
    # Whole steps are coupled on one process; one row at a time, ranks would not run as many forward passes each.
    ranks = st.just(1) if kind == "single" or loss == "aot" else few
    case = data.draw(cases(responses=responses, ranks=ranks, in_rows=in_rows))
    with layout(family, kind, block_cost) as policy:
        check_case(case, policy, loss)
        check_division(data, case, policy, loss)
        check_isolation(data, case, policy)


def test_a_coupled_loss_is_another_one_per_pack():
    """What the step-wide computation guards against shows in these numbers."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, VOCAB, 6, dtype=np.int32) for _ in range(12)]
    dataset = PreferenceDataset(
        [PreferenceGroup(g, *ids[3 * g : 3 * g + 1], tuple(ids[3 * g + 1 : 3 * g + 3])) for g in range(4)]
    )
    case = Case(dataset, ReferenceTable([(-30.0 - g, -33.0 + 2 * g) for g in range(4)]), 4, 36, True, 1, 0)
    packs = [(0, 1), (2, 3)]
    policy = make_policy("gpt2")
    whole, _ = run_packs(policy, case, packs, "aot")
    apart = sum(run_packs(policy, case, [pack], "aot")[0] for pack in packs)
    assert abs(whole - apart) > 1e-3
