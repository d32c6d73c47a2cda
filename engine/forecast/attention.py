"""What attention holds inside, where nothing outside can see it.

Native attention says so itself. Flash attention's backward pass holds what FlashAttention 2 allocates, in its own
package and in torch: a float32 sum of the queries' gradients (one for each split when sums are deterministic), a
float32 of each row and head, and gradients of keys and values for every query head where heads are grouped. Rows are
padded by 128 for each segment.
"""

from __future__ import annotations

from typing import Any

import torch

from ..model.attention import native

_NATIVE = {"dpo_engine::packed_attention": "forward", "dpo_engine::packed_attention_backward": "backward"}
_BACKWARD = {
    "torch_attn::_varlen_attn_backward",
    "aten::_flash_attention_backward",
    "flash_attn::_flash_attn_varlen_backward",
    "flash_attn_3::bwd",
}
_PADDING = 128
_PROCESSORS = 132
"""Of an H100 or H200."""


def workspace(func: Any, args: tuple[Any, ...], segments: torch.Tensor) -> int:
    """Bytes that an op of attention holds beside inputs and outputs; 0 for any other op.

    ``segments``: of the pack, as native attention takes them, with data.
    """
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    if direction := _NATIVE.get(func._schema.name):
        return native.scratch_bytes(direction, given["query"], given["key"], given["value"], segments)
    return _of_flash(given) if func._schema.name in _BACKWARD else 0


def _of_flash(given: dict[str, Any]) -> int:
    def first(*names: str) -> torch.Tensor:
        return next(given[name] for name in names if isinstance(given.get(name), torch.Tensor))

    query_THD, key_NKD = first("query", "q"), first("key", "k")
    tokens, heads, width = query_THD.shape
    segments = first("cum_seq_q", "cu_seq_q", "cu_seqlens_q").numel() - 1
    rows = tokens + _PADDING * segments
    splits = -(-_PROCESSORS // (segments * heads))
    padded_width = -(-width // 32) * 32 if width <= 192 else 256
    sums = 4 * rows * heads * (splits * padded_width + 1)
    expanded = 2 * key_NKD.shape[0] * heads * width * key_NKD.element_size()
    return sums + (expanded if key_NKD.shape[1] != heads else 0)
