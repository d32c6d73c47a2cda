"""What the pretended device (``tests/pretended_cuda.py``) refuses of single operations.

Waits of the host, tensors that lie elsewhere, and what CUDA's grouped products and fused optimizers do not take.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.pretended_tensor import OnDevice, on_host, wait

# Sizes that only the device knows, or a number of it.
_WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "argwhere",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


def check(func: Any, short: str, args: Any, kwargs: Any) -> None:
    """Refuse what waits for the device, and what does not run on one at all."""
    if short in _WAITS:
        wait(f"{short} needs a number from the GPU")
    if short == "repeat_interleave" and isinstance(args[-1], OnDevice) and kwargs.get("output_size") is None:
        wait("repeat_interleave without output_size needs a number from the GPU")
    if short == "segment_reduce" and not kwargs.get("unsafe", False):
        wait("segment_reduce checks lengths on the host unless they are declared safe")
    if short in _INDEXING:
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                wait(f"{short} with a mask needs its number of elements from the GPU")
            if isinstance(index, Tensor) and not isinstance(index, OnDevice):
                wait(f"{short} copies an index of the host, {list(index.shape)}, and waits")
    if short == "_grouped_mm":
        _check_grouped(*args[:2])
    if short.startswith(("_fused_adam", "_fused_sgd", "_fused_adagrad")):
        _check_fused(func, args, kwargs)
        return
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    strays = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim > 0]
    if strays and short not in _INDEXING:
        raise RuntimeError(f"{short}: tensors on cuda:0 and on the cpu, {list(strays[0].shape)}")


def _check_grouped(*matrices: Tensor) -> None:
    """ATen's grouped product takes bfloat16 in rows, or columns, of whole 16 bytes; what else there is runs expert by
    expert, on sizes that are read from the device."""
    if any(m.dtype != torch.bfloat16 for m in matrices):
        wait("a grouped product of other than bfloat16 reads the sizes of its groups")
        return
    for m in matrices:
        if 1 not in m.stride()[-2:] or any(s % 8 for s in m.stride()[-2:] if s != 1):
            raise RuntimeError(f"a grouped product needs strides of whole 16 bytes, got {m.stride()}")


def _check_fused(func: Any, args: Any, kwargs: Any) -> None:
    """What ATen's fused CUDA optimizers check (``check_fast_path_restrictions``), and what they take for granted."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    lists = [given[name] for name in ("self", "grads", "exp_avgs", "exp_avg_sqs")]
    if given.get("amsgrad"):
        lists.append(given["max_exp_avg_sqs"])
    first = lists[0][0]
    for tensors in lists:
        for tensor, param in zip(tensors, lists[0], strict=True):
            same = tensor.dtype == first.dtype and isinstance(tensor, OnDevice) and tensor.layout == torch.strided
            dense = tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(on_host(tensor))
            if not (same and dense and tensor.shape == param.shape and tensor.stride() == param.stride()):
                raise RuntimeError("params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout")
    if not first.dtype.is_floating_point:
        raise RuntimeError(f'"fused_adamw_kernel_cuda" not implemented for {first.dtype}')
    if math.prod(lists[-1][-1].shape) == 0:
        raise RuntimeError("the last tensor cannot be 0-size")
    for name in ("state_steps", "grad_scale", "found_inf", "lr"):
        value = given.get(name)
        for tensor in value if isinstance(value, list) else [value]:
            # The kernels read these as one float each, wherever the pointer leads.
            misplaced = not isinstance(tensor, OnDevice) or tensor.dtype != torch.float32
            if isinstance(tensor, Tensor) and (misplaced or tensor.numel() != 1):
                raise RuntimeError(f"{name} must be one float32 on the device of the parameters")
