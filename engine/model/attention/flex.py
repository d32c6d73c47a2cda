"""FlexAttention, torch's compiled attention: caps, sinks and chunks beside windows, in one call for a pack.

Keys are read where they lie, and scores are held a tile at a time. What differs between packs and layers comes as
tensors (lengths, ranges of keys, the factor and the cap of scores), so nothing is compiled again for another pack.

The sink of a head is one more score, whose value is zero: with the log-sum-exp L of the others and s the sink, the
output is that without sinks times sigmoid(L - s), through which gradients flow.

Shape suffixes: B = 1, H query heads, K key heads, T packed tokens, D head dimension, V width of values.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import out_of_memory
from ...packing.layout import AttentionPlan
from ...packing.rows import Segment
from ..compiling import compile_for_all_lengths
from ..sources import first_line
from .ranges import TILE, Ranges, Tiles, seen_keys
from .scores import Scores

HEAD_DIMS = (16, 256)
"""Narrowest and widest: Triton's products begin at 16, and beyond 256 its blocks do not fit every chip."""
BACKEND = "inductor"
_CAPABILITY = (8, 0)
"""Products of bfloat16 begin with Ampere."""
_TRIAL = (Segment(0, TILE + 2, 0, 0), Segment(TILE + 2, TILE + 5, 0, 2))
"""More than one tile of tokens: what fits in one is compiled by itself."""


def flex_attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scores: Scores) -> Tensor:
    """Attention of a pack over keys and values that are not gathered.

    Args:
        query: [1, H, T, D] in half precision.
        key: [1, K, T, D], K dividing H.
        value: [1, K, T, V].
        plan: the pack's plan.
        scores: options of the layer.

    Returns:
        [1, T, H, V].
    """
    if isinstance(query, FakeTensor) or query.is_meta:
        return _WithoutData.apply(query, key, value, scores.sinks).transpose(1, 2)  # type: ignore[no-any-return]
    mask = _block_mask(plan, query.device, scores.window, scores.chunk)
    wide = torch.promote_types(query.dtype, torch.float32)
    scaling = _number(plan, scores.scaling, wide, query.device)
    softcap = None if scores.softcap is None else _number(plan, scores.softcap, wide, query.device)
    # inputs have their dtype, and autocast would be one more state to compile for
    with torch.autocast(query.device.type, enabled=False):
        return _compiled(BACKEND)(query, key, value, scaling, softcap, scores.sinks, mask).transpose(1, 2)  # type: ignore[no-any-return]


@cache
def _compiled(backend: str) -> Any:
    return compile_for_all_lengths(_attend, backend, fullgraph=True)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: Tensor, softcap: Tensor | None, sinks: Tensor | None, mask: Any
) -> Tensor:
    """[1, H, T, V]: what is compiled. ``scaling`` and ``softcap`` have no dimension, and the dtype of scores."""
    from torch.nn.attention.flex_attention import AuxRequest
    from torch.nn.attention.flex_attention import flex_attention as attention

    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile leaves FlexAttention as it is, which then holds all scores")

    def change(score: Tensor, batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        score = score * scaling
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    options: dict[str, Any] = {"enable_gqa": True, "kernel_options": {"BACKEND": "TRITON"}}
    if sinks is None:
        return attention(query, key, value, change, mask, 1.0, **options)
    output, others = attention(query, key, value, change, mask, 1.0, **options, return_aux=AuxRequest(lse=True))
    wide = scaling.dtype
    shares = torch.sigmoid(others.lse.to(wide) - sinks.to(wide)[:, None])
    return (output.to(wide) * shares[..., None]).to(query.dtype)


def _block_mask(plan: AttentionPlan, device: torch.device, window: int | None, chunk: int | None) -> Any:
    """A pack's mask, kept with it so that its layers share it."""
    name = ("flex", device, window, chunk)
    if name not in plan.masks:
        plan.masks[name] = _new_mask(*seen_keys(plan.segments, device, window=window, chunk=chunk))
    return plan.masks[name]


def _new_mask(ranges: Ranges, tiles: Tiles) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    own_start, prefix_start, prefix_stop = ranges

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key <= query) & (key >= own_start[query])
        return own | ((key >= prefix_start[query]) & (key < prefix_stop[query]))

    tokens = len(own_start)
    return BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(tokens, tokens))


def _number(plan: AttentionPlan, number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on the device, kept with the pack: as one of Python it would be compiled in."""
    name = ("number", number, dtype, device)
    if name not in plan.masks:
        plan.masks[name] = torch.full((), number, dtype=dtype, device=device)
    return plan.masks[name]


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for a CUDA device, or None."""
    if torch._dynamo.config.disable:
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE)"
    if not torch._dynamo.is_dynamo_supported():
        return "torch.compile does not run on this Python"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "it is for compute capability 8.0 and later"
    return None


def lack(key_dim: int, value_dim: int) -> str | None:
    """Why its kernels do not take a layer, or None."""
    narrowest, widest = HEAD_DIMS
    if min(key_dim, value_dim) < narrowest:
        return f"takes head dimensions from {narrowest}"
    return f"takes head dimensions up to {widest}" if max(key_dim, value_dim) > widest else None


def failure(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> str | None:
    """Why it cannot be compiled for layers like this one, or None: tried once, on a handful of tokens."""
    if isinstance(query, FakeTensor) or query.is_meta:
        return None
    heads = tuple(x.shape[1] for x in (query, key, value))
    widths = tuple(x.shape[3] for x in (query, key, value))
    return _try(query.device, query.dtype, heads, widths, scores.softcap is not None, scores.sinks is not None)


@lru_cache(maxsize=32)
def _try(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, ...],
    widths: tuple[int, ...],
    softcap: bool,
    sinks: bool,
) -> str | None:
    def run() -> None:
        from ...packing.layout import plan_attention

        tokens = _TRIAL[-1].stop
        shapes = [(tokens, *sizes) for sizes in zip(heads, widths, strict=True)]
        tensors = [torch.ones(shape, device=device, dtype=dtype).transpose(0, 1)[None] for shape in shapes]
        query, key, value = (x.requires_grad_() for x in tensors)
        sink = torch.zeros(heads[0], device=device, requires_grad=True) if sinks else None
        scores = Scores(scaling=0.125, window=None, softcap=30.0 if softcap else None, sinks=sink, chunk=None)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            flex_attention(query, key, value, plan_attention(list(_TRIAL)), scores).sum().backward()
            if device.type == "cuda":
                # what fails on the device is known only then
                torch.cuda.synchronize(device)

    try:
        # a thread of its own has none of the modes and hooks of the layer that asks
        with ThreadPoolExecutor(1) as thread:
            thread.submit(run).result()
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        ImportError,
        LookupError,
        OSError,
        subprocess.SubprocessError,
    ) as error:
        if out_of_memory(error) is not None:
            raise
        return f"fails here: {type(error).__name__}: {first_line(error)}"
    return None


class _WithoutData(torch.autograd.Function):
    """What FlexAttention holds, for tensors that have shapes alone: the library takes none of an absent device."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        size, heads, tokens, _ = query.shape
        plain = query.new_empty(size, tokens, heads, value.shape[3]).transpose(1, 2)
        sums, _largest = (query.new_empty(size, heads, tokens, dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(query, key, value, sinks, plain, sums)
        return plain if sinks is None else torch.empty_like(plain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        query, key, value, sinks, plain, sums = ctx.saved_tensors
        rows = [torch.empty_like(sums)]
        if sinks is not None:
            rows += [torch.empty_like(sums), torch.empty_like(plain)]
        found = [torch.empty_like(x) for x in (query, key, value)]
        return *found, None if sinks is None else torch.empty_like(sinks)
