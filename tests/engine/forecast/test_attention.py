"""What attention holds inside: flash attention by the schemas that libraries register, native attention as measured."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import varlen

from benchmarks.measure import peak_extra_bytes
from dpo_kernels import native
from engine.forecast.attention import workspace
from engine.forecast.live_storage import LiveStorage

assert varlen is not None
OPS = {"varlen": torch.ops.torch_attn._varlen_attn_backward, "aten": torch.ops.aten._flash_attention_backward}
META = torch.device("meta")
# The prompt's segment, a response that shares it, another prompt's.
SEGMENTS = torch.tensor([[0, 700, 0, 0], [700, 900, 0, 400], [900, 1000, 900, 900]])


def flash_workspace(func, args) -> int:
    return workspace(func, args, SEGMENTS)


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
    found = flash_workspace(OPS[op].default, arguments(tokens, keys, heads, groups, width, segments))
    rows = tokens + 128 * segments
    expanded = 2 * keys * heads * width * 2 if groups != heads else 0
    assert found == rows * heads * padded * 4 + rows * heads * 4 + expanded


def test_few_segments_and_heads_are_split():
    """One sum for each of the parts that the processors of a device take."""
    found = flash_workspace(OPS["aten"].default, arguments(1024, 1024, 4, 4, 64, 3))
    rows, splits = 1024 + 128 * 3, 11
    assert found == 4 * rows * 4 * (splits * 64 + 1)


def test_another_op_holds_nothing():
    assert flash_workspace(torch.ops.aten.mm.default, (torch.empty(2, 2), torch.empty(2, 2))) == 0


def test_it_counts_while_the_op_runs():
    given = arguments(256, 256, 4, 2, 64, 2)
    random_state = torch.empty(2, dtype=torch.uint64, device=META)
    count = LiveStorage(META, flash_workspace)
    with count:
        OPS["varlen"](*given, True, random_state)
    assert count.largest_workspace == flash_workspace(OPS["varlen"].default, given)
    assert count.peak == count.largest_workspace + 256 * 64 * 2 * (4 + 2 + 2)


@pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_attention_holds_what_it_says(dtype, threads, monkeypatch):
    """Bytes that torch's allocator held beyond the results, from shapes alone on the other side."""
    monkeypatch.setattr(native, "threads", lambda: threads)
    T, H, K, D, V = 1000, 6, 3, 40, 24
    query, key, value, grad = (torch.randn(T, n, w).to(dtype) for n, w in ((H, D), (K, D), (K, V), (H, V)))
    ops, options = torch.ops.dpo_engine, (0.2, 0, 0, 0.0)
    outputs = ops.packed_attention(query, key, value, None, SEGMENTS, *options)
    found = {}
    for op, given in {
        ops.packed_attention.default: (query, key, value, None, SEGMENTS, *options),
        ops.packed_attention_backward.default: (grad, query, key, value, None, SEGMENTS, *outputs, *options),
    }.items():
        shapes = [x.to(META) if isinstance(x, torch.Tensor) else x for x in given]
        _, measured = peak_extra_bytes(lambda op=op, given=given: op(*given), torch.device("cpu"))
        found[op] = workspace(op, shapes, SEGMENTS)
        assert measured == found[op]
    # Of each thread: keys and values of the longest segment as float32, backward with their gradients.
    forward, backward = found.values()
    assert forward > threads * 700 * (D + V) * 4
    assert backward > threads * 700 * 2 * (D + V) * 4
