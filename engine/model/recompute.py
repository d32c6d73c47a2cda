"""Gradient checkpointing: what a block's forward pass leaves for its backward pass, and what is computed again.

In full, a block keeps its input alone and runs a second time. Selectively, it also keeps what its products and its
attention gave, which is nearly all of the arithmetic: the second time only norms, activations, rotations, casts and the
wide halves of low-rank adapters run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .mixers import checkpoint_contexts

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution"})
"""Names of operators, without namespace and overload."""
_THIN, _WIDER = 256, 8
"""A product over no more than so many elements, that gives so many times as many, takes as long as writing its result
takes: what an adapter adds to each linear layer would be kept beside what that layer gave."""
_PARTS = ("attention", "attn", "grouped_mm")
"""Of names that attention and the products of experts have in torch, flash-attn, transformers and here."""

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def checkpointing_options(how: bool | str) -> dict[str, Any]:
    """Arguments of ``gradient_checkpointing_enable`` for a value of ``train.gradient_checkpointing``."""
    contexts: Callable[[], Contexts] = _selective_contexts if how == "selective" else checkpoint_contexts
    return {"use_reentrant": False, "context_fn": contexts}


def is_selective(checkpoint: Any) -> bool:
    """Whether a checkpointing function that transformers made of such arguments is the selective one."""
    return getattr(checkpoint, "keywords", {}).get("context_fn") is _selective_contexts


def is_kept(operator: Any, *args: Any) -> bool:
    """Whether selective checkpointing keeps what an operator gives: that of attention, or of a product but thin ones.

    Args:
        args: of the operator; by its kind alone without them.
    """
    # operators that take functions, such as FlexAttention where it is not compiled further, have no schema
    name = operator._schema.name if hasattr(operator, "_schema") else operator.name()
    kind = name.rpartition("::")[2]
    if kind in _PRODUCTS:
        return not (kind in ("mm", "addmm") and _is_thin(args))
    return any(part in name for part in _PARTS)


def _is_thin(args: tuple[Any, ...]) -> bool:
    """Whether the second of two matrices, the last of the arguments, has few rows and many columns."""
    last = args[-1] if args else None
    if not (isinstance(last, Tensor) and last.ndim == 2):
        return False
    inner, columns = last.shape
    return inner <= _THIN and inner * _WIDER <= columns


def _policy(context: Any, operator: Any, *args: Any, **unused: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operator, *args) else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Contexts:
    forward, again = create_selective_checkpoint_contexts(_policy)
    rows_forward, rows_again = checkpoint_contexts()
    return _Both(rows_forward, forward), _Both(rows_again, again)


class _Both(AbstractContextManager[None]):
    """Two contexts as one, entered as often as it is."""

    def __init__(self, *contexts: AbstractContextManager[Any]):
        self._contexts = contexts
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            self._stacks.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._stacks.pop().__exit__(*error)
