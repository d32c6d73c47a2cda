from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.reference import ReferenceStore, load_ref_logps, load_ref_sums, model_digest
from engine.reference import precompute as run_pass

BUDGET = 128


@pytest.fixture
def store(tmp_path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "store")


def fill(policy, dataset, store, **options):
    return run_pass(policy, dataset, store, **({"tokens_per_pack": BUDGET, "progress": False} | options))


def scored_rows(policy) -> list[int]:
    rows = [row for pack in policy.scored for row in pack]
    policy.scored.clear()
    return sorted(rows)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("responses", [2, 4])
def test_every_token_gets_the_references_log_prob(policy, make_groups, store, share_prompts, responses):
    dataset = PreferenceDataset(make_groups(40, responses=responses))
    report = fill(policy, dataset, store, tokens_per_pack=256, share_prompts=share_prompts)
    assert (report.computed_rows, report.reused_rows) == (40, 0)
    assert report.tokens > 0
    stored = load_ref_logps(dataset, store, model_digest(policy))
    for group, found in zip(dataset, stored, strict=True):
        for values, expected in zip(found, policy.expected(group), strict=True):
            np.testing.assert_allclose(values, expected, atol=1e-6)


def test_sums_are_the_sums_of_the_tokens(policy, dataset, store):
    fill(policy, dataset, store)
    digest = model_digest(policy)
    for tokens, sums in zip(load_ref_logps(dataset, store, digest), load_ref_sums(dataset, store, digest), strict=True):
        np.testing.assert_allclose(sums, [t.sum(dtype=np.float64) for t in tokens], rtol=1e-14)


def test_a_second_pass_computes_nothing(policy, dataset, store):
    fill(policy, dataset, store)
    policy.scored.clear()
    report = fill(policy, dataset, ReferenceStore(store.path))
    assert policy.scored == []
    assert (report.computed_rows, report.reused_rows, report.tokens) == (0, 40, 0)
    assert str(report) == "40 rows reused, none computed"


def test_packing_and_sharing_do_not_enter_the_key(policy, dataset, store):
    fill(policy, dataset, store)
    policy.scored.clear()
    fill(policy, dataset, store, tokens_per_pack=64, share_prompts=False)
    assert policy.scored == []


def test_changing_one_row_recomputes_one_row(policy, make_groups, store):
    groups = make_groups(40)
    fill(policy, PreferenceDataset(groups), store)
    policy.scored.clear()
    changed = replace(groups[17], response_ids=(groups[17].response_ids[0], np.asarray([1, 2, 3], np.int32)))
    dataset = PreferenceDataset([*groups[:17], changed, *groups[18:]])
    report = fill(policy, dataset, store)
    assert (report.computed_rows, report.reused_rows) == (1, 39)
    assert scored_rows(policy) == [17]
    assert report.tokens == len(changed.prompt_ids) + 3
    assert len(load_ref_logps(dataset, store, model_digest(policy))) == 40


def test_new_rows_alone_are_computed(policy, make_groups, store):
    groups = make_groups(40)
    fill(policy, PreferenceDataset(groups[:25]), store)
    scored_rows(policy)
    fill(policy, PreferenceDataset(groups), store)
    assert scored_rows(policy) == list(range(25, 40))


def test_other_weights_dtype_or_attention_recompute_everything(make_policy, dataset, store):
    fill(make_policy(), dataset, store)
    for changed in (make_policy(seed=1), make_policy(dtype=torch.bfloat16), make_policy(backend="flash")):
        assert fill(changed, dataset, store).computed_rows == 40


def test_repeated_rows_and_responses_are_computed_once(policy, make_groups, store):
    a, b, c = make_groups(3)
    swapped = replace(a, row=3, response_ids=a.response_ids[::-1])
    mixed = replace(a, row=4, response_ids=(a.response_ids[0], b.response_ids[0]))
    twice = replace(c, row=5, response_ids=(c.response_ids[0], c.response_ids[0]))
    dataset = PreferenceDataset([a, b, c, swapped, mixed, twice])
    fill(policy, dataset, store)
    assert len(store) == 7
    assert scored_rows(policy) == [0, 1, 2, 4]
    stored = load_ref_logps(dataset, store, model_digest(policy))
    for group, found in zip(dataset, stored, strict=True):
        for values, expected in zip(found, policy.expected(group), strict=True):
            np.testing.assert_allclose(values, expected, atol=1e-6)


def test_a_prompt_of_many_pairs_that_is_stored_in_part(policy, make_groups, store):
    group = make_groups(1)[0]
    best = np.asarray([1, 2, 3], np.int32)
    fewer = replace(group, pairs=((0, 1),))
    more = replace(group, row=1, response_ids=(*group.response_ids, best), pairs=((2, 0), (2, 1), (0, 1)))
    fill(policy, PreferenceDataset([fewer]), store)
    assert fill(policy, PreferenceDataset([more]), store).computed_rows == 1
    both = PreferenceDataset([fewer, more])
    fresh = ReferenceStore(store.path.with_name("fresh"))
    fill(policy, both, fresh)
    for place in (store, fresh):
        for group, found in zip(both, load_ref_logps(both, place, model_digest(policy)), strict=True):
            for values, expected in zip(found, policy.expected(group), strict=True):
                np.testing.assert_allclose(values, expected, atol=1e-6)


def test_an_interrupted_pass_keeps_what_it_had_and_the_rest_uses_the_same_packs(policy, dataset, store, monkeypatch):
    whole = ReferenceStore(store.path.with_name("whole"))
    fill(policy, dataset, whole)
    planned = list(policy.scored)
    assert len(planned) > 6
    policy.scored.clear()
    real = policy.logps

    def interrupted(batch):
        if len(policy.scored) == 4:
            raise KeyboardInterrupt
        return real(batch)

    monkeypatch.setattr(policy, "logps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(policy, dataset, store)
    monkeypatch.setattr(policy, "logps", real)
    assert policy.scored == planned[:4]
    policy.scored.clear()
    report = fill(policy, dataset, ReferenceStore(store.path))
    # The pack that was launched last had not been handed over yet.
    assert policy.scored == planned[3:]
    assert report.computed_rows == sum(map(len, planned[3:]))
    digest = model_digest(policy)
    for first, second in zip(
        load_ref_logps(dataset, store, digest), load_ref_logps(dataset, whole, digest), strict=True
    ):
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_values_become_durable_while_the_pass_runs(policy, dataset, store, monkeypatch):
    sizes = []
    real = policy.logps

    def watch(batch):
        sizes.append(len(ReferenceStore(store.path)))
        return real(batch)

    monkeypatch.setattr(policy, "logps", watch)
    fill(policy, dataset, store, flush_seconds=0)
    assert sizes[:2] == [0, 0]
    assert all(later > earlier for earlier, later in pairwise(sizes[1:]))


def test_scoring_leaves_the_policy_and_the_random_state_alone(policy, dataset, store):
    policy.train()
    before = torch.get_rng_state()
    fill(policy, dataset, store)
    assert set(policy.modes) == {(True, False, False)}
    assert policy.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failure_restores_the_policy(policy, dataset, store, monkeypatch):
    policy.train()
    monkeypatch.setattr(policy, "logps", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fill(policy, dataset, store)
    assert policy.training
    assert torch.is_grad_enabled()
    assert not policy._in_reference


def test_a_log_prob_that_is_not_finite_names_the_row_and_keeps_the_rest(policy, store):
    groups = [PreferenceGroup(row, np.int32([3]), (np.int32([4]), np.int32([5, row]))) for row in range(10, 16)]
    with torch.no_grad():
        policy.model.weight[5, 13] = float("nan")
        policy.model.weight[5, 12] = float("-inf")
    policy.model.weight.data[5].nan_to_num_(nan=-3.4e38, neginf=-torch.inf)
    with pytest.raises(UserError, match=r"row 12: .* a log-prob that is not finite; check the model's weights$"):
        fill(policy, PreferenceDataset(groups), store, tokens_per_pack=4)
    assert len(store) > 0


def test_no_memory_for_a_pack_names_the_remedy(policy, dataset, store, monkeypatch):
    def exhausted(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policy, "logps", exhausted)
    with pytest.raises(UserError, match=r"packs of 128 tokens: lower packing\.tokens_per_pack"):
        fill(policy, dataset, store)


def test_a_group_longer_than_a_pack_is_refused_before_anything_runs(policy, dataset, store):
    with pytest.raises(UserError, match=r"packing\.tokens_per_pack is 8, but row"):
        fill(policy, dataset, store, tokens_per_pack=8)
    assert policy.scored == []


def test_a_missing_row_is_an_error_never_zero(policy, make_groups, store):
    groups = [replace(g, row=100 + g.row) for g in make_groups(10)]
    fill(policy, PreferenceDataset(groups[:4] + groups[5:8]), store)
    dataset = PreferenceDataset(groups)
    for load in (load_ref_logps, load_ref_sums):
        with pytest.raises(UserError, match=r"row 104 and 2 more rows \(of 10\).*run `dpo precompute`"):
            load(dataset, store, model_digest(policy))
