"""Attention over a pack, for any transformers model that calls the attention interface.

Functions are registered with ``AttentionInterface``; the ``AttentionPlan`` of the pack travels as the keyword argument
``attention_plan`` of the model's forward. No mask function is registered: transformers then builds no mask, and the
isolation of documents rests on the plan alone. All backends compute the same thing:

    response segment q attends to its prompt prefix ++ itself, causally, aligned at the bottom right.

Shape suffixes: B = 1, H query heads, K key heads, T packed tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from ... import distributed
from ...errors import BackendError, UserError, out_of_memory
from ...packing.layout import AttentionPlan
from ..layers import layer_configs
from ..sources import first_line
from . import flex
from .choice import KERNELS, NAMES, implementation_name
from .exchange import own_heads, own_tokens, whole_heads
from .native import DTYPES, native_attention
from .scores import Scores
from .segments import open_attention, sdpa_attention
from .sinks import attend_with_sinks

PLAN_ARGUMENT = "attention_plan"
# Tensors that models hand on with their other keyword arguments; attention does not read them.
_NOT_FOR_SCORES = {"position_ids", "cache_position"}
_ALIGNMENT = 8
"""Kernels take head dimensions that are multiples of this."""


def packed_attention(
    backends: tuple[str, ...],
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
        backends: names of backends, of which the first that can computes the layer.
        query: [1, H, T, D].
        key, value: [1, K, T, D], K dividing H.
        attention_plan: the pack's plan.
        scaling: factor of the scores; 1 / sqrt(D) by default.
        sliding_window: a token attends to at most this many tokens, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: [H] attention sinks.

    Returns:
        ([1, T, H, D], None). Under autocast, and in every backend, the inputs are cast to its dtype, which is then that
        of the output: models with float32 weights hand on float32 queries beside bfloat16 values.

    Raises:
        UserError: the model does something that packs do not support.
        BackendError: none of ``backends`` can compute the layer, or the one that should fails.
    """
    if attention_plan is None:
        raise UserError(f"{type(module).__name__} does not pass keyword arguments of the model to its attention")
    attention_plan.readers.add(type(module).__name__)
    _check_unused(module, unused)
    kind = _layer_kind(module)
    if kind == "sliding_attention" and sliding_window is None:
        # Qwen 2 MoE tells its mask of the window, but not its attention
        sliding_window = _of_layer(module, "sliding_window")
    # Llama 4: a layer does not look beyond its chunk
    chunk = _of_layer(module, "attention_chunk_size") if kind == "chunked_attention" else None
    scores = Scores(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        chunk=None if chunk is None or attention_plan.max_seqlen_k <= chunk else chunk,
    )
    query, key, value = _compute_dtype(query, key, value)
    if not attention_plan.divided:
        return _attend(backends, module, query, key, value, attention_plan, scores), None
    heads = whole_heads(query, key, value, attention_plan.segments[-1].stop)
    scores = scores._replace(sinks=None if s_aux is None else own_heads(s_aux))
    return own_tokens(_attend(backends, module, *heads, attention_plan, scores), query.shape[2]), None


def _attend(
    backends: tuple[str, ...],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scores: Scores,
) -> torch.Tensor:
    """[1, T, H, D]: attention of the first of ``backends`` that can compute the layer."""
    name = _first_able(backends, module, query, key, value, scores)
    if name != "sdpa":
        return _run_kernel(name, module, query, key, value, plan, scores)
    options: dict[str, Any] = {"scaling": scores.scaling, "window": scores.window}
    if scores.sinks is not None or scores.softcap is not None:
        return open_attention(query, key, value, plan, **options, softcap=scores.softcap, sinks=scores.sinks)
    return sdpa_attention(query, key, value, plan, **options, chunk=scores.chunk)


def _compute_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors in the dtype in which autocast computes; without it, in that of the last one."""
    device_type = tensors[0].device.type
    # tensors without data have no autocast to ask for
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else tensors[-1].dtype
    return [x.to(dtype) for x in tensors]


def _first_able(
    backends: tuple[str, ...],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: Scores,
) -> str:
    """The first backend that can compute a layer; what stands in for the chosen one is said once."""
    head_dim = max(query.shape[-1], value.shape[-1])
    lacks: dict[str, str | None] = {}
    able = None
    for name in backends:
        lacks[name] = lack(name, query, value, scores)
        if lacks[name] is None and name == "flex" and len(backends) > 1:
            lacks[name] = flex.failure(query, key, value, scores)
        if lacks[name] is None:
            able = name
            break
    reasons = "; ".join(f"{name} {reason}" for name, reason in lacks.items() if reason)
    if able is None:
        raise BackendError(
            f"model.attention={backends[0]} cannot compute {type(module).__name__}: {reasons}; "
            "set model.attention to auto, which then takes another backend for such layers"
        )
    if able != backends[0]:
        _say_once(f"attention of {type(module).__name__}, head dimension {head_dim}: {able} ({reasons})")
    return able


def lack(name: str, query: torch.Tensor, value: torch.Tensor, scores: Scores) -> str | None:
    """What a backend lacks for a layer, or None."""
    if name == "sdpa":
        return None
    if name == "native":
        return None if query.dtype in DTYPES else f"does not compute in {str(query.dtype).removeprefix('torch.')}"
    if name == "flex":
        return flex.lack(query.shape[-1], value.shape[-1])
    kernel = KERNELS[name]
    if max(query.shape[-1], value.shape[-1]) > kernel.head_dim:
        return f"takes head dimensions up to {kernel.head_dim}"
    if scores.chunk is not None:
        return "attends beyond chunks"
    if scores.softcap is not None and (not kernel.softcap or scores.sinks is not None):
        return "cannot cap its scores"
    if scores.sinks is not None and kernel.sinks is None:
        return "has no attention sinks"
    return None


@lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    distributed.say(text)


def _run_kernel(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scores: Scores,
) -> torch.Tensor:
    """[1, T, H, D]: one call of a kernel for the whole pack."""
    if not query.shape[2] == key.shape[2] == value.shape[2]:
        raise ValueError(f"{key.shape[2]} keys and {value.shape[2]} values for {query.shape[2]} queries")
    if name == "native":
        attend: Callable[[], torch.Tensor] = partial(native_attention, query, key, value, plan, scores)
    elif name == "flex":
        attend = partial(flex.flex_attention, query, key, value, plan, scores)
    else:
        attend = _varlen_call(name, query, key, value, plan, scores)
    try:
        output = attend()
    except (RuntimeError, TypeError, ValueError, ImportError, AttributeError, AssertionError) as error:
        if out_of_memory(error) is not None:
            raise
        raise BackendError(
            f"attention backend {name} fails in {type(module).__name__}: {type(error).__name__}: {first_line(error)}; "
            f"set model.attention to another of {', '.join(NAMES)}, and see `dpo doctor`"
        ) from error
    return output[..., : value.shape[-1]]


def _varlen_call(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scores: Scores
) -> Callable[[], torch.Tensor]:
    """The call of a variable-length kernel: its inputs are ready; [1, T, H, D], padded."""
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in _equal_widths(query, key, value))
    key_TKD, value_TKD = plan.gather_keys(key_TKD), plan.gather_keys(value_TKD)
    inputs = (_readable(query_THD), _readable(key_TKD), _readable(value_TKD))
    kernel = KERNELS[name]
    options: dict[str, Any] = {"scaling": scores.scaling, "window": scores.window}

    def attend() -> torch.Tensor:
        if scores.sinks is not None and kernel.sinks is not None:
            return attend_with_sinks(kernel.sinks, *inputs, scores.sinks, plan, **options)[None]
        return kernel.attend(*inputs, plan, **options, softcap=scores.softcap)[None]

    return attend


def _readable(x: torch.Tensor) -> torch.Tensor:
    """A tensor as kernels read it, 16 bytes at a time from rows that lie anywhere; a copy where it does not lie so."""
    starts = (*x.stride()[:-1], int(x.storage_offset()))
    return x if x.stride(-1) == 1 and not any(start % _ALIGNMENT for start in starts) else x.contiguous()


def _check_unused(module: torch.nn.Module, arguments: dict[str, Any]) -> None:
    """Raise for a tensor that the attention of a model depends on and that packs would ignore, such as a mask."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in _NOT_FOR_SCORES:
            raise UserError(f"{type(module).__name__} gives its attention `{name}`, which packs do not support")


def _layer_kind(module: torch.nn.Module) -> str | None:
    """What the config calls the attention of this layer, if it tells layers apart."""
    kinds, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return None if kinds is None or layer is None else kinds[layer]


def _of_layer(module: torch.nn.Module, name: str) -> Any:
    """An attribute of the config of this layer."""
    config: Any = module.config
    return getattr(layer_configs(config)[module.layer_idx], name)  # type: ignore[index]


def _equal_widths(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Pad head dimensions with zeros to a common multiple of 8: latent attention has narrower values than keys."""
    width = -(-max(x.shape[-1] for x in tensors) // _ALIGNMENT) * _ALIGNMENT
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def register_backends() -> None:
    """Make every backend known to transformers, alone and before those that may stand in for it. Idempotent."""
    for count in range(1, len(NAMES) + 1):
        for names in combinations(NAMES, count):

            @torch.compiler.disable(reason="it reads the plan of the pack")
            def attention(module, query, key, value, attention_mask=None, _names=names, **kwargs):
                kwargs.setdefault(PLAN_ARGUMENT, None)
                return packed_attention(_names, module, query, key, value, attention_mask=attention_mask, **kwargs)

            AttentionInterface.register(implementation_name(names), attention)
