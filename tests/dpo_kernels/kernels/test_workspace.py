"""What the ops allocate at the size of a real head, counted on tensors without memory."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia.compiler")

from benchmarks.shapes import GPU_BENCHMARK
from dpo_kernels.head import Head, Needs
from dpo_kernels.kernels import frozen_head, launch
from dpo_kernels.kernels.offline import compiling_for
from dpo_kernels.linear_dpo import triton_pairs
from dpo_kernels.linear_dpo.interface import PairScorer, Want
from dpo_kernels.linear_logps import tile_filter, triton_tiles
from dpo_kernels.linear_logps.interface import Want as LogpsWant
from dpo_kernels.linear_logps.stats import STATS
from dpo_kernels.losses import resolve_loss
from dpo_kernels.pairs import LossOptions


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and somebody still holds, and the most there ever were."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def extra_bytes(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Most bytes of one forward beside its results, with the tiles of an sm_90."""
    _, D, V = GPU_BENCHMARK
    D, dtype = options.get("D", D), options.get("dtype", torch.bfloat16)
    T, S = sum(lengths), len(lengths)

    scorer = PairScorer(
        mix=resolve_loss("sigmoid", None),
        options=LossOptions(),
        offsets=[0, *itertools.accumulate(lengths)],
        ref_logps_S=meta(S),
        lengths_S=None,
        mean_length=None,
        scale_P=meta(S // 2),
        cu_S1=meta(S + 1, dtype=torch.int64),
    )
    hidden, weight = meta(T, D, dtype=dtype), meta(V, D, dtype=dtype)
    labels, head = meta(T, dtype=torch.int64), Head(weight, softcap=options.get("softcap"))
    want = Want(Needs(True, True, False), options.get("stats", ()))
    monkeypatch.setattr(launch, "device_arch", lambda device: "sm_90")
    with LiveBytes(hidden, weight, labels) as live, compiling_for("sm_90"):
        results = triton_pairs.forward(hidden, head, labels, scorer, ignore_index=-100, want=want)
    assert results.gradients.dW_VD.dtype == dtype
    return live.most - sum(t.untyped_storage().nbytes() for t in tree_leaves(results) if t is not None)


LONG_PAIR = (5000, 3192)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(
    "lengths",
    [(1024,) * 8, (500, 244) * 10 + (700, 52), (1, 3) * 2048, (2000, 1000) * 2 + (1800, 392)],
    ids=["responses of 1024", "uneven pairs", "short pairs", "long pairs"],
)
def test_at_most_one_gibibyte(lengths, softcap, monkeypatch):
    """N=8192 D=4096 V=128256, and any pairs that fit a chunk."""
    assert sum(lengths) == GPU_BENCHMARK.T
    assert extra_bytes(lengths, monkeypatch, softcap=softcap) <= 2**30


@pytest.mark.parametrize(
    ("lengths", "options"),
    [((1793, 1792), {"stats": ("entropy",)}), ((1921, 1920), {"softcap": 30.0}), ((2000, 2041), {})],
    ids=["statistics", "softcap", "plain"],
)
def test_rows_that_do_not_fill_a_tile_leave_less_for_a_launch(lengths, options, monkeypatch):
    assert extra_bytes(lengths, monkeypatch, **options) <= 2**30


def test_a_pair_that_is_longer_than_a_chunk_is_held_whole(monkeypatch):
    """Twice the rows of a chunk: their exponentials, 2 GB, instead of two float32 weights, 4 GiB."""
    assert sum(LONG_PAIR) == GPU_BENCHMARK.T
    assert 1.95 * 2**30 < extra_bytes(LONG_PAIR, monkeypatch) < 2.05 * 2**30


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float32, "D": 512}, {"dtype": torch.float32, "D": 511}],
    ids=["bfloat16", "float32", "float32, not aligned"],
)
@pytest.mark.parametrize("lengths", [(1024,) * 8, (90, 110), LONG_PAIR], ids=["chunks", "few rows", "a long pair"])
def test_what_the_paired_loss_states(lengths, options, monkeypatch):
    """Exponentials, and the partials of their tiles, which are narrow where rows are not aligned."""
    extra = extra_bytes(lengths, monkeypatch, **options)
    D, dtype = options.get("D", GPU_BENCHMARK.D), options.get("dtype", torch.bfloat16)
    hidden, weight = meta(sum(lengths), D, dtype=dtype), meta(GPU_BENCHMARK.V, D, dtype=dtype)
    offsets = [0, *itertools.accumulate(lengths)]
    stated = triton_pairs.forward_workspace(hidden, weight, offsets, need_weight=True)
    assert 0.97 * stated < extra <= stated + 2**20


def extra_bytes_of_log_probs(
    pass_name: str,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int] = GPU_BENCHMARK,
    stats=(),
    softcap=None,
    dtype=torch.bfloat16,
) -> int:
    """As `extra_bytes`. Products of half operands with float32 results need no copy on a GPU, and are left out here."""
    T, D, V = shape
    monkeypatch.setattr(launch, "device_arch", lambda device: "sm_90")
    for module in (triton_tiles, frozen_head):
        monkeypatch.setattr(module, "add_product_", lambda *products, **options: None)
    hidden, weight = meta(T, D, dtype=dtype), meta(V, D, dtype=dtype)
    labels, row, lse = meta(T, dtype=torch.int64), meta(T), meta(T, dtype=torch.float64)
    head = Head(weight, softcap=softcap)
    kept = meta(T // triton_tiles.FILTER_ROWS, tile_filter.num_tiles(V), dtype=torch.bool)
    with LiveBytes(hidden, weight, labels, row, lse, kept) as live, compiling_for("sm_90"):
        if pass_name.endswith("backward"):
            tiles = tile_filter.Kept(labels, kept) if pass_name.startswith("filtered") else None
            needs = Needs(True, True, False, tiles=tiles)
            results = triton_tiles.backward(row, hidden, head, labels, lse, ignore_index=-100, needs=needs)
        else:
            wanted = LogpsWant(pass_name.endswith("frozen head"), stats, pass_name.startswith("filtered"))
            *results, mass = triton_tiles.forward(hidden, head, labels, ignore_index=-100, want=wanted)
        if pass_name == "filtered forward":
            rows = triton_tiles.FILTER_ROWS
            plan = tile_filter.plan_filter(mass, labels, ignore_index=-100, filter_mass=1e-3, rows=rows)
            results = [*results, *plan.kept]
    return live.most - sum(t.untyped_storage().nbytes() for t in results if t is not None)


PASSES = ["forward", "forward, frozen head", "backward", "filtered forward", "filtered backward"]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(
    ("pass_name", "stats"), [*((name, ()) for name in PASSES), *((name, STATS) for name in PASSES if "forward" in name)]
)
def test_per_token_log_probs_take_at_most_300_mebibytes(pass_name, stats, softcap, monkeypatch):
    """The same size, with and without statistics of tokens."""
    extra = extra_bytes_of_log_probs(pass_name, monkeypatch, stats=stats, softcap=softcap)
    least = 60 if pass_name == "forward" else 180 if pass_name.startswith("filtered") else 280
    assert (60 if stats else least) * 2**20 < extra <= 300 * 2**20
    if pass_name.startswith("forward") and not stats:
        T, D, V = GPU_BENCHMARK
        hidden, weight = meta(T, D, dtype=torch.bfloat16), meta(V, D, dtype=torch.bfloat16)
        stated = triton_tiles.forward_workspace(hidden, weight, pass_name.endswith("frozen head"))
        # Numbers of rows come on top; tiles of 128 columns have half the partials that are stated.
        assert 0.45 * stated < extra < stated + 2**20


@pytest.mark.parametrize("stats", [(), STATS], ids=["", "stats"])
@pytest.mark.parametrize("pass_name", ["forward", "forward, frozen head"])
def test_partials_do_not_grow_with_rows_and_vocabulary(pass_name, stats, monkeypatch):
    """N=32768 D=4096 V=262144: eight times the tiles of above."""
    T, D, V = 32768, 4096, 262144
    extra = extra_bytes_of_log_probs(pass_name, monkeypatch, (T, D, V), stats=stats)
    # 4096 columns, the narrowest slice, with seven numbers of each row and 64 columns; and dX in fp32.
    slice_and_dx = T * 4096 * 2 + T * 4096 // 64 * 28 + T * D * 4
    assert extra <= (slice_and_dx if pass_name.endswith("frozen head") else 128 * 2**20) + 8 * 2**20


@pytest.mark.parametrize("stats", [(), STATS], ids=["", "stats"])
def test_tiles_of_32_columns_have_twice_the_partials(stats, monkeypatch):
    """float32 rows that are not aligned: what is stated, and what a slice gives to statistics, follows the tiles."""
    T, D, V = 2048, 511, 128256
    extra = extra_bytes_of_log_probs("forward, frozen head", monkeypatch, (T, D, V), stats, dtype=torch.float32)
    hidden, weight = meta(T, D), meta(V, D)
    if stats:
        stated = triton_tiles.SLICE_BYTES + hidden.nbytes
    else:
        stated = triton_tiles.forward_workspace(hidden, weight, need_dx=True)
    assert 0.9 * stated < extra <= stated + 2**20


def test_the_count_counts():
    """What is alive together is added, what is gone is not, and inputs and views are free."""
    x = torch.empty(1000, device="meta")
    with LiveBytes(x) as live:
        y = x[:500] + 1
        del y
        z = x * 2
        w = z.view(10, 100)[3]
    assert live.most == live.now == 4000
    del z, w
    assert live.now == 0
