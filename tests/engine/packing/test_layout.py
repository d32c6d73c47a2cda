"""The layout of a pack, by example and against the plain definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.data.groups import PreferenceGroup
from engine.packing import build_batch

pytestmark = pytest.mark.property


def group(row: int, prompt: list[int], *responses: list[int]) -> PreferenceGroup:
    return PreferenceGroup(row, np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses))


def test_shared_layout_by_example():
    batch = build_batch([group(4, [1, 2, 3], [10, 11], [20]), group(9, [5], [30], [40, 41])])
    assert batch.input_ids_T.tolist() == [1, 2, 3, 10, 11, 20, 5, 30, 40, 41]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2]
    assert batch.labels_N.tolist() == [10, 11, 20, 30, 40, 41]
    assert batch.rows_N.tolist() == [2, 3, 2, 6, 6, 8]
    assert batch.cu_responses_S1.tolist() == [0, 2, 3, 4, 6]
    assert batch.plan.cu_seqlens_q.tolist() == [0, 5, 6, 8, 10]
    assert batch.plan.cu_seqlens_k.tolist() == [0, 5, 9, 11, 14]
    assert batch.plan.key_rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 8, 9]
    assert (batch.plan.max_seqlen_q, batch.plan.max_seqlen_k) == (5, 5)
    assert batch.rows == (4, 9)
    assert batch.responses_per_group == (2, 2)
    assert (batch.num_tokens, batch.num_unshared_tokens) == (10, 5 + 4 + 2 + 3)


def test_unshared_layout_by_example():
    batch = build_batch([group(4, [1, 2, 3], [10, 11], [20])], share_prompts=False)
    assert batch.input_ids_T.tolist() == [1, 2, 3, 10, 11, 1, 2, 3, 20]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.rows_N.tolist() == [2, 3, 7]
    assert batch.plan.key_rows is None
    assert batch.plan.cu_seqlens_k.tolist() == batch.plan.cu_seqlens_q.tolist() == [0, 5, 9]
    assert batch.num_tokens == batch.num_unshared_tokens == 9


ids = st.lists(st.integers(0, 99), min_size=1, max_size=9)


@given(st.lists(st.tuples(ids, st.lists(ids, min_size=2, max_size=5)), min_size=1, max_size=6), st.booleans())
def test_every_token_sees_its_own_sequence_and_nothing_else(spec, share):
    groups = [group(i, prompt, *responses) for i, (prompt, responses) in enumerate(spec)]
    batch = build_batch(groups, share_prompts=share)
    tokens, positions = batch.input_ids_T, batch.position_ids_T
    plan = batch.plan
    key_rows = torch.arange(len(tokens)) if plan.key_rows is None else plan.key_rows
    visible = {}
    for i, segment in enumerate(plan.segments):
        keys = key_rows[plan.cu_seqlens_k[i] : plan.cu_seqlens_k[i + 1]]
        assert segment.num_keys == len(keys)
        for j, row in enumerate(range(segment.start, segment.stop)):
            visible[row] = keys[: len(keys) - segment.num_queries + j + 1]
    assert sorted(visible) == list(range(len(tokens)))
    s = 0
    for g in groups:
        for response in g.response_ids:
            start, stop = batch.cu_responses_S1[s : s + 2].tolist()
            sequence = [*g.prompt_ids, *response]
            for j, row in enumerate(batch.rows_N[start:stop].tolist()):
                context = sequence[: len(g.prompt_ids) + j]
                assert tokens[visible[row]].tolist() == context
                assert positions[visible[row]].tolist() == list(range(len(context)))
                assert batch.labels_N[start + j] == response[j]
            s += 1
    assert s == batch.num_responses


def test_empty_parts_are_refused():
    with pytest.raises(ValueError, match="row 5: the prompt and every response need at least one token"):
        build_batch([group(5, [1], [2], [])])
    with pytest.raises(ValueError, match="row 5"):
        build_batch([group(5, [], [2], [3])])


def test_moving_keeps_response_offsets_on_the_cpu():
    batch = build_batch([group(0, [1, 2], [3], [4, 5])])
    moved = batch.to("meta")
    assert moved.input_ids_T.is_meta
    assert moved.plan.key_rows.is_meta
    assert moved.cu_responses_S1.device.type == "cpu"
    assert batch.to("cpu") is batch
