"""The optimizers of bitsandbytes on weights that may lie in parts on several processes.

bitsandbytes scales its 8-bit moments by blocks of 256 numbers of the flat tensor, which cross the rows that processes
divide. Here no block crosses a row, whose last one may be shorter. So moments, scales and updates are the same on any
number of processes, and where rows are whole blocks they are those of bitsandbytes to the bit.

A process updates the rows that it holds, some at a time, which the library sees as a parameter of its own. Rows of
other widths are padded with zeros meanwhile. Between updates the slots of a parameter are plain tensors, since the
library and its paged memory know no others; checkpoints get them sharded as their parameter is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from .host_memory import sharded_rows

BLOCK = 256
"""Numbers that share a scale."""
LEAST = 4096
"""Numbers of a parameter below which its moments keep 32 bits, as in bitsandbytes."""
LEAST_PAGED = 100_000
"""Numbers that a process holds of a parameter below which its moments are not paged, as in bitsandbytes."""
PIECE = 1 << 22
"""Numbers that are updated at a time, where single rows are not longer: what padding takes stays small."""
MOMENTS, SCALES = ("state1", "state2"), ("absmax1", "absmax2")
"""Slots of state. Scales are float32 [rows, blocks of a row]."""
_TABLES = ("dynamic", "udynamic")
"""What 8 bits stand for, by moment: the library's names."""


def is_eight_bits(shape: Sequence[int]) -> bool:
    """Whether moments of a shape are kept in 8 bits: not those of few numbers, nor of vectors, whose rows are single
    numbers with a scale each."""
    return math.prod(shape) >= LEAST and math.prod(shape[1:]) > 1


def blocks_of_row(shape: Sequence[int]) -> int:
    """Scales of each row of a parameter; all dimensions but the first are its row."""
    return -(-math.prod(shape[1:]) // BLOCK)


def moment_bytes(shape: Sequence[int], *, wide: bool) -> int:
    """Of both moments of a parameter and their scales, in an optimizer of 8 bits.

    Args:
        wide: whether they keep 32 bits, whatever the shape is.
    """
    if wide or not is_eight_bits(shape):
        return 2 * 4 * math.prod(shape)
    return 2 * (math.prod(shape) + 4 * shape[0] * blocks_of_row(shape))


def wide_parameters(model: nn.Module) -> list[Tensor]:
    """Those whose moments keep 32 bits: rows of embeddings have gradients of very different sizes, as the Trainer has
    it, too."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


class RowBlocks(torch.optim.Optimizer):
    """Mixed into an optimizer of bitsandbytes with two moments: see ``by_rows``."""

    state: Any
    args: Any
    name2qmap: dict[str, Tensor]
    is_paged: bool

    def keep_wide(self, params: Iterable[Tensor]) -> None:
        """Called once, after the optimizer is made.

        Args:
            params: those whose moments keep 32 bits, whatever the optimizer is.
        """
        wide = {id(p) for p in params}
        self._wide = {
            (number, place)
            for number, group in enumerate(self.param_groups)
            for place, p in enumerate(group["params"])
            if id(p) in wide
        }
        # The library would look for exceptions of its own, and move all state to the device.
        self.initialized = True

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        local = distributed.local_tensor(p.detach()).contiguous()
        eight = self.args.optim_bits == 8 and is_eight_bits(p.shape) and (gindex, pindex) not in self._wide
        slots = self.state[p]
        slots["step"] = 0
        for moment, scale in zip(MOMENTS, SCALES, strict=True):
            slots[moment] = self._buffer(local, torch.uint8 if eight else torch.float32)
            if eight:
                slots[scale] = torch.zeros(len(local), blocks_of_row(p.shape), device=p.device)

    def _buffer(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros, in paged memory where the library would take that."""
        return self.get_state_buffer(like, dtype=dtype)  # type: ignore[attr-defined, no-any-return]

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        slots = self.state[p]
        assert p.grad is not None
        weights, grad = distributed.local_tensor(p.detach()), distributed.local_tensor(p.grad)
        own = weights.contiguous()
        for piece in self._pieces(own, grad.contiguous(), slots):
            weight = piece.pop("weight")
            weight.grad = piece.pop("grad")
            self.state[weight] = {"step": slots["step"], **piece}
            super().update_step(group, weight, gindex, pindex)  # type: ignore[misc]
            del self.state[weight]
        slots["step"] += 1
        if own is not weights:
            weights.copy_(own)

    def _pieces(self, weight: Tensor, grad: Tensor, slots: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
        """Rows of a parameter, its gradient and its slots, as flat tensors; what is written to them arrives."""
        if not weight.numel():
            return
        rows = len(weight) if weight.ndim else 1
        names = ("weight", "grad", *MOMENTS)
        whole = dict(zip(names, (weight, grad, *(slots[name] for name in MOMENTS)), strict=True))
        width = padded = weight.numel() // rows
        tables: dict[str, Tensor] = {}
        if SCALES[0] in slots:
            padded = slots[SCALES[0]].shape[1] * BLOCK
            tables = {f"qmap{i}": table for i, table in enumerate(self._tables(weight.device), 1)}
        together = max(1, PIECE // padded)
        for start in range(0, rows, together):
            parts = {
                name: _rows_of(tensor, tensor.view(rows, width)[start : start + together])
                for name, tensor in whole.items()
            }
            scales = {name: slots[name][start : start + together].view(-1) for name in SCALES if name in slots}
            given = parts if padded == width else {n: self._padded(n, t, padded, weight) for n, t in parts.items()}
            yield {name: _rows_of(t, t.view(-1)) for name, t in given.items()} | scales | tables
            if given is not parts:
                for name in ("weight", *MOMENTS):
                    parts[name].copy_(given[name][:, :width])

    def _padded(self, name: str, part: Tensor, width: int, weight: Tensor) -> Tensor:
        """Rows of ``part`` on the device of ``weight``, padded with what stands for zero."""
        zero = self._zeros[MOMENTS.index(name)] if name in MOMENTS else 0
        made = torch.full((len(part), width), zero, dtype=part.dtype, device=weight.device)
        made[:, : part.shape[1]].copy_(part)
        return made

    @property
    def _zeros(self) -> tuple[int, int]:
        """The 8 bits that stand for zero, by moment: half of the signed table is below it."""
        return 127, 0

    def _tables(self, device: torch.device) -> list[Tensor]:
        for name in _TABLES:
            self.name2qmap[name] = self.name2qmap[name].to(device)
        return [self.name2qmap[name] for name in _TABLES]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """As torch has it: the slots of each parameter by its number, sharded as the parameter is."""
        found = torch.optim.Optimizer.state_dict(self)
        params = self._parameters()
        state = {
            index: {slot: sharded_rows(params[index], value) for slot, value in slots.items()}
            for index, slots in found["state"].items()
        }
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """The inverse of ``state_dict``. Paged moments go to paged memory without being on the device before."""
        super().load_state_dict({**state_dict, "state": {}})
        params = self._parameters()
        for index, slots in state_dict["state"].items():
            p = params[index]
            self.state[p] = {slot: self._placed(slot, value, p.device) for slot, value in slots.items()}

    def _placed(self, slot: str, value: Any, device: torch.device) -> Any:
        if not isinstance(value, Tensor):
            return value
        local = distributed.local_tensor(value)
        if slot in MOMENTS and self.is_paged:
            like = torch.empty((), device=device).expand(local.shape)
            return self._buffer(like, local.dtype).copy_(local)
        return local.to(device)


def by_rows(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class of bitsandbytes' optimizers, with ``RowBlocks`` mixed in."""
    return type(kind.__name__, (RowBlocks, kind), {})


def from_flat_blocks(tensors: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State by ``<slot>/<parameter>`` in blocks of rows, of what was written in bitsandbytes' own blocks; any other
    state as it is.

    Rows of whole blocks keep their bits. Others are rounded to 8 bits once more, and vectors are widened.
    """
    found = {key: tensor for key, tensor in tensors.items() if not key.startswith("qmap")}
    for key, table in tensors.items():
        slot, name = key.split("/", 1)
        if not slot.startswith("qmap"):
            continue
        moment, scale, shape = f"state{slot[-1]}/{name}", f"absmax{slot[-1]}/{name}", params[name].shape
        scales, width = found.pop(scale), math.prod(shape[1:])
        if width % BLOCK == 0:
            found[scale] = scales.view(shape[0], -1)
            continue
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        found[moment] = values = dequantize_blockwise(found[moment], absmax=scales, code=table, blocksize=BLOCK)
        if is_eight_bits(shape):
            rows = nn.functional.pad(values.view(shape[0], width), (0, -width % BLOCK))
            codes, quantised = quantize_blockwise(rows, code=table, blocksize=BLOCK)
            found[moment] = codes.view(rows.shape)[:, :width].reshape(shape)
            found[scale] = quantised.absmax.view(shape[0], -1)
    return found


def _rows_of(tensor: Tensor, view: Tensor) -> Tensor:
    """A view of a tensor, of paged memory like that: the library's mark is lost by views, and it refuses others."""
    if getattr(tensor, "is_paged", False):
        view.is_paged, view.page_deviceid = True, tensor.page_deviceid  # type: ignore[attr-defined]
    return view
