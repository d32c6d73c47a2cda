"""The ranges of keys that queries see, and the tiles that hold them, against masks and torch's own tiles of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from engine.model.attention import flex
from engine.model.attention.ranges import TILE, seen_keys
from engine.model.attention.segments import _causal_mask
from engine.packing.layout import Segment

CPU = torch.device("cpu")


def random_segments(seed: int) -> tuple[Segment, ...]:
    """Prompts with one to three responses, of lengths around and below a tile's."""
    rng = np.random.default_rng(seed)
    segments: list[Segment] = []
    end = 0
    for _ in range(rng.integers(1, 4)):
        start, prompt = end, int(rng.integers(1, 2 * TILE))
        for response in range(rng.integers(1, 4)):
            length = int(rng.integers(1, 2 * TILE))
            if response == 0:
                segments.append(Segment(start, start + prompt + length, start, start))
            else:
                segments.append(Segment(end, end + length, start, start + prompt))
            end = segments[-1].stop
    return tuple(segments)


def plain_mask(segments: tuple[Segment, ...], window: int | None, chunk: int | None) -> torch.Tensor:
    tokens = segments[-1].stop
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for s in segments:
        keys = torch.cat([torch.arange(s.prefix_start, s.prefix_stop), torch.arange(s.start, s.stop)])
        mask[s.start : s.stop, keys] = _causal_mask(s.num_queries, len(keys), CPU, window=window, chunk=chunk)
    return mask


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (1, None), (150, None), (None, 100), (200, 260)])
@pytest.mark.parametrize("seed", range(4))
def test_masks_and_tiles(seed, window, chunk):
    segments = random_segments(seed)
    tokens = segments[-1].stop
    found = flex._new_mask(*seen_keys(segments, CPU, window=window, chunk=chunk))
    assert torch.equal(
        create_mask(found.mask_mod, 1, 1, tokens, tokens, device="cpu")[0, 0], plain_mask(segments, window, chunk)
    )
    want = create_block_mask(found.mask_mod, 1, 1, tokens, tokens, device="cpu")
    assert found.shape == want.shape == (1, 1, tokens, tokens)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, places = (getattr(found, f"{name}_{part}") for part in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(want, f"{name}_num_blocks"))
        for row, count in enumerate(counts[0, 0]):
            assert torch.equal(places[0, 0, row, :count], getattr(want, f"{name}_indices")[0, 0, row, :count])


def test_a_long_pack_needs_no_number_for_each_pair_of_tokens():
    """Tiles are counted by ranges: a pack of 200,000 tokens has 4e10 pairs."""
    tokens = 200_000
    _, tiles = seen_keys((Segment(0, tokens, 0, 0),), CPU, window=None, chunk=None)
    size = -(-tokens // TILE)
    # before the diagonal, all but the last row, which is no whole tile of queries
    assert tiles.full_counts[0, 0].tolist() == [*range(size - 1), 0]
    assert tiles.partial_counts[0, 0].tolist() == [*[1] * (size - 1), size]
