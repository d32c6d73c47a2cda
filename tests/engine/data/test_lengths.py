"""Flat token counts against the plain sums over small arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.lengths import GroupLengths

group_lengths = st.lists(st.lists(st.integers(1, 60), min_size=2, max_size=6).map(np.array), max_size=20)


@given(group_lengths, st.booleans())
def test_figures_of_all_groups_are_those_of_each(lengths, share):
    flat = GroupLengths.of(lengths)
    assert GroupLengths.of(flat) is flat
    assert [n.tolist() for n in flat] == [n.tolist() for n in lengths]
    assert flat.prompts.tolist() == [n[0] for n in lengths]
    assert flat.responses.tolist() == [len(n) - 1 for n in lengths]
    assert flat.completions.tolist() == [n[1:].sum() for n in lengths]
    assert flat.longest.tolist() == [n[1:].max() for n in lengths]
    packed = [n.sum() if share else (n[0] + n[1:]).sum() for n in lengths]
    assert flat.packed(share_prompts=share).tolist() == packed


def test_visible_pairs_are_those_of_the_causal_masks():
    prompt, first, second = 5, 3, 2
    lengths = GroupLengths.of([np.array([4, 1, 1]), np.array([prompt, first, second])])
    rows = [*range(1, prompt + first + 1), *(prompt + i for i in range(1, second + 1))]
    assert lengths.visible_pairs(share_prompts=True)[1] == sum(rows)
    apart = [*range(1, prompt + first + 1), *range(1, prompt + second + 1)]
    assert lengths.visible_pairs(share_prompts=False)[1] == sum(apart)


def test_it_is_a_sequence():
    lengths = GroupLengths.of([np.array([1, 2]), np.array([3, 4, 5]), np.array([6, 7])])
    assert len(lengths) == 3
    assert lengths[1].tolist() == lengths[-2].tolist() == [3, 4, 5]
    assert [n.tolist() for n in lengths[::2]] == [[1, 2], [6, 7]]
    with pytest.raises(IndexError):
        lengths[3]
