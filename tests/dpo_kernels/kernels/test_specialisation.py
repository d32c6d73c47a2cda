"""How often a training run compiles: what differs from batch to batch must not be part of a kernel's key."""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia.compiler")

import triton
from triton.runtime.jit import JITFunction

from dpo_kernels.head import Head, Needs
from dpo_kernels.kernels import bfloat16_weights, launch, offline, tile_logps
from dpo_kernels.linear_dpo import triton_pairs
from dpo_kernels.linear_dpo.interface import PairScorer, Want
from dpo_kernels.linear_logps import tile_filter, triton_tiles
from dpo_kernels.linear_logps.interface import Want as LogpsWant
from dpo_kernels.linear_logps.stats import STATS
from dpo_kernels.losses import resolve_loss
from dpo_kernels.pairs import LossOptions

D, V = 16, 1201
BATCHES = 200
MOST_KEYS = 8


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch):
    """Kernel -> the keys under which Triton would have compiled it. Nothing is compiled, and nothing runs."""
    found: dict[str, set[str]] = defaultdict(set)

    def note(self: Any, key: str, signature: Any, device: Any, constexprs: Any, options: Any, *rest: Any) -> Any:
        found[self.fn.__name__].add(key)
        assert options.enable_fp_fusion, f"{self.fn.__name__} leaves to Triton's version how it rounds"
        return SimpleNamespace()

    monkeypatch.setattr(JITFunction, "_do_compile", note)
    # What Triton 3.10 takes for granted.
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    # A device of its own: kernels that other tests compiled would not ask for a compilation.
    monkeypatch.setattr(offline._OfflineDriver, "get_current_device", lambda self: "noted")
    monkeypatch.setattr(launch, "device_arch", lambda device: "sm_90")
    # Several chunks, blocks of rows and slices at the size of a test.
    monkeypatch.setattr(triton_pairs, "WORKSPACE_BYTES", 4 * 2**20)
    monkeypatch.setattr(triton_tiles, "SLICE_BYTES", 2**19)
    monkeypatch.setattr(triton_tiles, "MIN_SLICE", 256)
    monkeypatch.setattr(tile_logps, "PARTIAL_BYTES", 2**14)
    return found


class Batch:
    """Responses of random lengths, and the head of one model."""

    head = Head(torch.empty(V, D, dtype=torch.bfloat16))

    def __init__(self) -> None:
        pairs = int(torch.randint(1, 12, ()))
        self.lengths = torch.randint(1, 120, (2 * pairs,)).tolist()
        T = sum(self.lengths)
        self.hidden = torch.empty(T, D, dtype=torch.bfloat16)
        self.labels = torch.randint(0, V, (T,))

    def loss(self, loss_type: str = "sigmoid", trained: bool = True) -> None:
        S, cu = len(self.lengths), [0, *itertools.accumulate(self.lengths)]
        scorer = PairScorer(
            mix=resolve_loss(loss_type, None),
            options=LossOptions(),
            offsets=cu,
            ref_logps_S=torch.empty(S),
            lengths_S=None,
            mean_length=None,
            scale_P=torch.empty(S // 2),
            cu_S1=torch.tensor(cu),
        )
        want = Want(Needs(True, trained, False))
        triton_pairs.forward(self.hidden, self.head, self.labels, scorer, ignore_index=-100, want=want)

    def log_probs(self, *, frozen: bool, stats: tuple[str, ...] = (), filtered: bool = False) -> None:
        """Forward, and backward where there is one."""
        T, want = len(self.labels), LogpsWant(frozen, stats, filtered)
        triton_tiles.forward(self.hidden, self.head, self.labels, ignore_index=-100, want=want)
        if frozen:
            return
        tiles = None
        if filtered:
            blocks, columns = tile_filter.num_blocks(T, triton_tiles.FILTER_ROWS), tile_filter.num_tiles(V)
            tiles = tile_filter.Kept(torch.randperm(T), torch.rand(blocks, columns) < 0.5)
        rows = (self.labels, torch.empty(T, dtype=torch.float64))
        needs = Needs(True, True, False, tiles=tiles)
        triton_tiles.backward(torch.empty(T), self.hidden, self.head, *rows, ignore_index=-100, needs=needs)

    def rounding(self) -> None:
        """Of weights of another name, from another place on, at another update."""
        values = torch.empty(len(self.labels), D)
        key, start, turned = (int(torch.randint(1 << bits, ())) for bits in (32, 40, 16))
        upper = torch.empty_like(values, dtype=torch.bfloat16)
        bfloat16_weights.stochastic_round(upper, values, key=key, start=start, turned=turned, rounds=((16, 3),))


CALLS = {
    "paired loss": lambda batch: batch.loss(),
    "paired loss, frozen head": lambda batch: batch.loss(trained=False),
    "log-probs": lambda batch: batch.log_probs(frozen=False),
    "log-probs with statistics": lambda batch: batch.log_probs(frozen=False, stats=STATS),
    "frozen head": lambda batch: batch.log_probs(frozen=True),
    "frozen head with statistics": lambda batch: batch.log_probs(frozen=True, stats=STATS),
    "filter": lambda batch: batch.log_probs(frozen=False, filtered=True),
    "rounding": lambda batch: batch.rounding(),
}


@pytest.mark.parametrize("call", CALLS)
def test_keys_of_random_batches(call, keys):
    """200 steps of a run; the first few must have met all there are."""
    with offline.compiling_for("sm_90"):
        for _ in range(BATCHES // 4):
            CALLS[call](Batch())
        early = {kernel: len(found) for kernel, found in keys.items()}
        for _ in range(BATCHES - BATCHES // 4):
            CALLS[call](Batch())
    counts = {kernel: len(found) for kernel, found in keys.items()}
    assert counts
    assert max(counts.values()) <= MOST_KEYS, counts
    assert counts == early
