"""Attention over a pack, for any transformers model that calls the attention interface.

One function per backend is registered with ``AttentionInterface``; the ``AttentionPlan`` of the pack travels as the
keyword argument ``attention_plan`` of the model's forward. No mask function is registered: transformers then builds no
mask, and the isolation of documents rests on the plan alone. All backends compute the same thing:

    response segment q attends to its prompt prefix ++ itself, causally, aligned at the bottom right.

Shape suffixes: B = 1, H query heads, K key heads, T packed tokens, D head dimension.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from engine.errors import UserError
from engine.packing.layout import AttentionPlan

PLAN_ARGUMENT = "attention_plan"
# transformers gives a meaning of its own to names that contain "flash" or "sdpa".
_IMPLEMENTATIONS = {"flash": "dpo_packed_fa", "varlen": "dpo_packed_varlen", "sdpa": "dpo_packed_segments"}
# Tensors that models hand on with their other keyword arguments; attention does not read them.
_NOT_FOR_SCORES = {"position_ids", "cache_position"}


class Backend(NamedTuple):
    """The chosen way to compute attention, and why."""

    name: str
    reason: str

    @property
    def implementation(self) -> str:
        """The name under which transformers knows it."""
        return _IMPLEMENTATIONS[self.name]


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Choose the attention backend once, for a device and a compute dtype.

    Args:
        requested: ``auto``, or one of ``flash``, ``varlen``, ``sdpa``; an explicit request never falls back.

    Raises:
        UserError: the requested backend cannot run here.
    """
    obstacles = {"flash": _flash_obstacle(device, dtype), "varlen": _varlen_obstacle(device, dtype), "sdpa": None}
    if requested != "auto":
        if obstacles[requested]:
            raise UserError(
                f"model.attention={requested} cannot run here: {obstacles[requested]}; set model.attention to auto"
            )
        return Backend(requested, "requested")
    name = next(name for name, obstacle in obstacles.items() if obstacle is None)
    passed_over = [f"{other}: {obstacle}" for other, obstacle in obstacles.items() if obstacle]
    return Backend(name, "; ".join(passed_over) if passed_over else "first choice")


def _cuda_half_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the compute dtype is {str(dtype).removeprefix('torch.')}"
    return None


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install dpo-kernels[flash])"
    return _cuda_half_obstacle(device, dtype)


def _varlen_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    obstacle = _cuda_half_obstacle(device, dtype)
    if obstacle is None and not {"window_size", "enable_gqa"} <= _varlen_parameters():
        obstacle = f"torch {torch.__version__} has no varlen attention with windows and grouped-query heads"
    return obstacle


@lru_cache(maxsize=1)
def _varlen_parameters() -> frozenset[str]:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _per_segment_attention(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    plan: AttentionPlan,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Call ``attend(query, key, value)`` for each segment; [B, T, H, D]. Splitting once keeps backward linear in T."""
    sizes = [s.num_queries for s in plan.segments]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query_BHTD, key_BKTD, value_BKTD))
    owner = {s.start: i for i, s in enumerate(plan.segments)}
    outputs = []
    for segment, query, key, value in zip(plan.segments, queries, keys, values, strict=True):
        prefix = segment.prefix_stop - segment.prefix_start
        if prefix:
            first = owner[segment.prefix_start]
            key = torch.cat([keys[first].narrow(2, 0, prefix), key], dim=2)
            value = torch.cat([values[first].narrow(2, 0, prefix), value], dim=2)
        outputs.append(attend(query, key, value).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _causal_mask(
    plan: AttentionPlan,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    *,
    window: int | None,
    chunk: int | None = None,
) -> torch.Tensor:
    """bool [queries, keys], True where attended; the last query is aligned with the last key."""
    shape = (num_queries, num_keys, device, window, chunk)
    if shape not in plan.masks:
        offset = num_keys - num_queries
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(offset)
        if window is not None:
            mask.triu_(offset - window + 1)
        if chunk is not None:
            # keys begin with the first token of the sequence, so their index is their position
            chunk_of_key = torch.arange(num_keys, device=device) // chunk
            mask &= chunk_of_key[offset:, None] == chunk_of_key
        plan.masks[shape] = mask
    return plan.masks[shape]


def _sdpa_attention(query, key, value, plan, *, scaling, window, chunk=None) -> torch.Tensor:
    limit = min(window or plan.max_seqlen_k, chunk or plan.max_seqlen_k)
    grouped = query.shape[1] != key.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        num_queries, num_keys = q.shape[2], k.shape[2]
        plain = num_queries == num_keys <= limit
        mask = None if plain else _causal_mask(plan, num_queries, num_keys, q.device, window=window, chunk=chunk)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=scaling, enable_gqa=grouped)

    return _per_segment_attention(query, key, value, plan, attend)


def _eager_attention(query, key, value, plan, *, scaling, window, softcap, sinks) -> torch.Tensor:
    """Scores in the open, for what fused attention lacks: capped scores (Gemma 2) and attention sinks (gpt-oss)."""
    groups = query.shape[1] // key.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(2, 3)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = _causal_mask(plan, q.shape[2], k.shape[2], q.device, window=window)
        scores = scores.masked_fill(~mask, float("-inf")).float()
        if sinks is not None:
            sink = sinks.float().reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
            return torch.cat([scores, sink], dim=3).softmax(dim=3)[..., :-1].to(v.dtype) @ v
        return scores.softmax(dim=3).to(v.dtype) @ v

    return _per_segment_attention(query, key, value, plan, attend)


def _gather_keys(x_BKTD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    return plan.gather_keys(x_BKTD[0].transpose(0, 1))


def _flash_attention(query, key, value, plan, *, scaling, window, softcap) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    out_THD = flash_attn_varlen_func(
        query[0].transpose(0, 1).contiguous(),
        _gather_keys(key, plan),
        _gather_keys(value, plan),
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=True,
    )
    return out_THD[None]


def _varlen_attention(query, key, value, plan, *, scaling, window) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out_THD: torch.Tensor = varlen_attn(  # type: ignore[assignment]
        query[0].transpose(0, 1).contiguous(),
        _gather_keys(key, plan),
        _gather_keys(value, plan),
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        scale=scaling,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out_THD[None]


def packed_attention(
    backend: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attention_plan: AttentionPlan | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over a pack, in the form that transformers expects.

    Args:
        backend: ``flash``, ``varlen`` or ``sdpa``.
        query: [1, H, T, D].
        key, value: [1, K, T, D], K dividing H.
        attention_plan: the pack's plan.
        scaling: factor of the scores; 1 / sqrt(D) by default.
        sliding_window: a token attends to at most this many tokens, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: [H] attention sinks.

    Returns:
        ([1, T, H, D], None).
    """
    if attention_plan is None:
        raise UserError(f"{type(module).__name__} does not pass keyword arguments of the model to its attention")
    attention_plan.readers.add(type(module).__name__)
    _check_unused(module, unused)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind, config = _layer_kind(module)
    if kind == "sliding_attention" and sliding_window is None:
        # Qwen 2 MoE tells its mask of the window, but not its attention
        sliding_window = config.sliding_window
    options: dict[str, Any] = {"scaling": scaling, "window": sliding_window}
    if s_aux is not None or (softcap is not None and backend != "flash"):
        return _eager_attention(query, key, value, attention_plan, **options, softcap=softcap, sinks=s_aux), None
    # Llama 4: a layer does not look beyond its chunk
    chunk = config.attention_chunk_size if kind == "chunked_attention" else None
    if backend == "sdpa" or (chunk is not None and attention_plan.max_seqlen_k > chunk):
        return _sdpa_attention(query, key, value, attention_plan, **options, chunk=chunk), None
    width = value.shape[-1]
    query, key, value = _equal_widths(query, key, value)
    if backend == "flash":
        output = _flash_attention(query, key, value, attention_plan, **options, softcap=softcap)
    else:
        output = _varlen_attention(query, key, value, attention_plan, **options)
    return output[..., :width], None


def _check_unused(module: torch.nn.Module, arguments: dict[str, Any]) -> None:
    """Raise for a tensor that the attention of a model depends on and that packs would ignore, such as a mask."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in _NOT_FOR_SCORES:
            raise UserError(f"{type(module).__name__} gives its attention `{name}`, which packs do not support")


def _layer_kind(module: torch.nn.Module) -> tuple[str | None, Any]:
    """What the config calls the attention of this layer, if it tells layers apart, and the config."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    return (kinds[layer] if kinds is not None and layer is not None else None), config


def _equal_widths(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Pad head dimensions with zeros to the largest one: latent attention has narrower values than keys."""
    width = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def register_backends() -> None:
    """Make every backend known to transformers. Idempotent."""
    for name, implementation in _IMPLEMENTATIONS.items():

        def attention(module, query, key, value, attention_mask=None, _name=name, **kwargs):
            kwargs.setdefault(PLAN_ARGUMENT, None)
            return packed_attention(_name, module, query, key, value, attention_mask=attention_mask, **kwargs)

        AttentionInterface.register(implementation, attention)
