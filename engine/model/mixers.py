"""Modules that mix tokens outside the attention interface, run on the rows of a pack.

State-space layers, linear attention, short convolutions and recurrent blocks make each token of the ones before it,
whatever document these belong to. Such a module gets rows (``engine/packing/rows.py``): what it is given of packed
tokens is laid out as one row a response, the module runs as it is, and what it gives is put back into the pack. Padding
stands behind every token of its row, where a causal module does not look. A module that keeps sequences apart where it
is told to gets rows end to end instead, without padding. No family is named here: ``checks.py`` finds the modules.

Shape suffixes: T packed tokens, B rows of a block, L its longest row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..packing.rows import RowPlan

_ROWS: ContextVar[RowPlan | None] = ContextVar("rows", default=None)


class RowsOfPack(AbstractContextManager[None]):
    """While it is entered, wrapped modules take the rows of this pack; for None they run as they are."""

    def __init__(self, rows: RowPlan | None):
        self._rows = rows
        self._tokens: list[Token[RowPlan | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_ROWS.set(self._rows))

    def __exit__(self, *unused: object) -> None:
        _ROWS.reset(self._tokens.pop())


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For gradient checkpointing: what is computed again in the backward pass, by another thread on a GPU, is computed
    on the rows of the pack that the forward pass had."""
    return nullcontext(), RowsOfPack(_ROWS.get())


def class_name(module: nn.Module) -> str:
    """The name of a module's class, which sharding changes."""
    return type(module).__name__.removeprefix("FSDP")


def put_in_rows(model: nn.Module, names: tuple[str, ...]) -> None:
    """Wrap the modules of the named classes, and unwrap all others."""
    for module in model.modules():
        wrapped = isinstance(vars(module).get("forward"), InRows)
        if wrapped and class_name(module) not in names:
            del module.forward
        elif not wrapped and class_name(module) in names:
            module.forward = InRows(module)


def boundary_arguments(kind: type[nn.Module], rows: RowPlan) -> dict[str, torch.Tensor]:
    """What the modules of a class are told of rows that are laid end to end, by transformers' names of it."""
    if rows.boundaries is None:
        return {}
    ends, on_cpu, numbers = rows.boundaries
    # the last spares kernels that plan on the CPU a wait for the device
    given = {"cu_seq_lens_q": ends, "seq_idx": numbers, "cu_seqlens_cpu": on_cpu}
    return {name: value for name, value in given.items() if _takes(kind.forward, name)}


@cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name, or of any."""
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class InRows:
    """The forward of a wrapped module. It names the module, so that a copy of a model has copies of its own."""

    def __init__(self, module: nn.Module):
        self.module = module

    @torch.compiler.disable(reason="rows are laid out by the pack")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = _ROWS.get()
        return self.plain(*args, **kwargs) if rows is None else self.compute(rows, args, kwargs)

    @property
    def plain(self) -> Callable[..., Any]:
        """The forward of the module itself."""
        return partial(type(self.module).forward, self.module)

    def compute(self, rows: RowPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives for a pack that is laid out as these rows."""
        leaves, form = tree_flatten((args, kwargs))
        told = boundary_arguments(type(self.module), rows)
        blocks = zip(*(_split(leaf, rows) for leaf in leaves), strict=True)
        outputs = []
        # What it calls in turn is in rows already.
        with RowsOfPack(None):
            for block in blocks:
                block_args, block_kwargs = tree_unflatten(list(block), form)
                outputs.append(self.plain(*block_args, **block_kwargs | told))
        return _join(outputs, rows)


def _split(value: Any, rows: RowPlan) -> list[Any]:
    """An argument for each block: tensors [..., 1, T, ...] and [T, ...] as rows, anything else as it is."""
    if isinstance(value, torch.Tensor) and rows.num_tokens in value.shape[:3]:
        if value.ndim == 1:
            # counts the tokens of a forward pass
            return [value[:length] for _, length in rows.shapes]
        place = value.shape.index(rows.num_tokens)
        if place == 0:
            return [block.flatten(0, 1) for block in rows.split(value)]
        if value.shape[place - 1] == 1:
            packed = value.squeeze(place - 1).movedim(place - 1, 0)
            return [block.movedim((0, 1), (place - 1, place)) for block in rows.split(packed)]
    return [value] * len(rows.shapes)


def _join(outputs: list[Any], rows: RowPlan) -> Any:
    """What the module gives for the pack. Of what is no row of each token, such as a last state, nothing is kept."""
    flat, form = tree_flatten(outputs[0])
    leaves = [flat, *(tree_flatten(output)[0] for output in outputs[1:])]
    return tree_unflatten([_join_leaf(list(parts), rows) for parts in zip(*leaves, strict=True)], form)


def _join_leaf(parts: list[Any], rows: RowPlan) -> Any:
    if not isinstance(parts[0], torch.Tensor):
        return parts[0]
    blocks = [_as_block(part, *shape) for part, shape in zip(parts, rows.shapes, strict=True)]
    found = [block for block in blocks if block is not None]
    return rows.join(found)[None] if len(found) == len(blocks) else None


def _as_block(part: torch.Tensor, rows: int, length: int) -> torch.Tensor | None:
    """[B, L, ...] from [B, L, ...], [B * L, ...], or from [1, L, ...] and [L, ...] for all rows; else None."""
    if part.ndim < 2:
        return None
    if part.shape[:2] == (rows, length):
        return part
    if len(part) == rows * length:
        return part.unflatten(0, (rows, length))
    if part.shape[:2] == (1, length):
        return part.expand(rows, *part.shape[1:])
    return part.expand(rows, *part.shape) if len(part) == length else None
