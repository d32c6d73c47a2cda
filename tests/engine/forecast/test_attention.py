"""What attention's backward pass holds inside, from the schemas that libraries register."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import varlen

from engine.forecast.attention import backward_workspace
from engine.forecast.live_storage import LiveStorage

assert varlen is not None
OPS = {"varlen": torch.ops.torch_attn._varlen_attn_backward, "aten": torch.ops.aten._flash_attention_backward}
META = torch.device("meta")


def arguments(tokens: int, keys: int, heads: int, groups: int, width: int, segments: int) -> tuple:
    query = torch.empty(tokens, heads, width, dtype=torch.bfloat16, device=META)
    key = torch.empty(keys, groups, width, dtype=torch.bfloat16, device=META)
    lse = torch.empty(heads, tokens, device=META)
    offsets = torch.empty(segments + 1, dtype=torch.int32, device=META)
    return query, query, key, key, query, lse, offsets, offsets, tokens, keys


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("groups", "width", "padded"), [(8, 128, 128), (32, 128, 128), (32, 80, 96), (4, 256, 256)])
def test_a_pack_of_many_segments(op, groups, width, padded):
    tokens, keys, heads, segments = 16_384, 20_000, 32, 48
    found = backward_workspace(OPS[op].default, arguments(tokens, keys, heads, groups, width, segments))
    rows = tokens + 128 * segments
    expanded = 2 * keys * heads * width * 2 if groups != heads else 0
    assert found == rows * heads * padded * 4 + rows * heads * 4 + expanded


def test_few_segments_and_heads_are_split():
    """One sum for each of the parts that the processors of a device take."""
    found = backward_workspace(OPS["aten"].default, arguments(1024, 1024, 4, 4, 64, 3))
    rows, splits = 1024 + 128 * 3, 11
    assert found == 4 * rows * 4 * (splits * 64 + 1)


def test_another_op_holds_nothing():
    assert backward_workspace(torch.ops.aten.mm.default, (torch.empty(2, 2), torch.empty(2, 2))) == 0


def test_it_counts_while_the_op_runs():
    given = arguments(256, 256, 4, 2, 64, 2)
    random_state = torch.empty(2, dtype=torch.uint64, device=META)
    count = LiveStorage(META, backward_workspace)
    with count:
        OPS["varlen"](*given, True, random_state)
    assert count.largest_workspace == backward_workspace(OPS["varlen"].default, given)
    assert count.peak == count.largest_workspace + 256 * 64 * 2 * (4 + 2 + 2)
