"""``linear_logps`` by Triton kernels: tiles of logits that never leave the chip, products by the vendor's library.

Legend: T rows, D features, V vocabulary, v columns of a slice.

Forward is one product. Backward recomputes logits by slices of the vocabulary (4 products in all), writes each slice of
dW once and needs one slice of gradients in the compute dtype as workspace. With a frozen head forward also forms dX, in
one more product, and there is no backward (2 in all).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.head import Gradients, Head, Needs
from dpo_kernels.kernels.filtered_products import TileLists, add_filtered_dx_, filtered_db, filtered_dw
from dpo_kernels.kernels.frozen_head import frozen_head
from dpo_kernels.kernels.launch import TileLaunch, multiprocessors, obstacle
from dpo_kernels.kernels.products import add_product_
from dpo_kernels.kernels.slice_grad import slice_grad
from dpo_kernels.kernels.tile_config import MAX_BLOCK
from dpo_kernels.kernels.tile_logps import PARTIAL_BYTES, empty_exps, partial_width, score_rows
from dpo_kernels.kernels.token_stats import NUM_PARTIALS, TOKEN_STATS
from dpo_kernels.linear_logps.interface import Scores, Want
from dpo_kernels.linear_logps.tile_filter import COLUMNS

SLICE_BYTES = 160 * 2**20
"""Largest size of a slice: with fp32 dX beside it, 8192 rows of 4096 features stay within 300 MiB."""
MIN_SLICE = 4096
"""Narrower slices would spend more time on reading and writing dX than on products."""

FILTER_ROWS = 128
"""See ``dpo_kernels.linear_logps.interface``: with tiles of 128 columns what tensor cores are still fed well with."""

STATS = TOKEN_STATS
"""Token statistics that the kernels compute."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See ``dpo_kernels.linear_logps.interface``."""
    return obstacle(device, dtype)


def forward(hidden_TD: Tensor, head: Head, labels_T: Tensor, *, ignore_index: int, want: Want) -> Scores:
    """See ``dpo_kernels.linear_logps.interface``."""
    dx_TD = mass_TC = None
    token_stats = bool(want.stats)
    common: dict[str, Any] = {"ignore_index": ignore_index, "token_stats": token_stats}
    if want.dx:
        stats_width = None
        if token_stats:
            stats_width = _partial_width(hidden_TD, head.weight_VD, frozen=True, token_stats=True)
        columns = slice_columns(hidden_TD, stats_width=stats_width)
        logps_T, lse_T, dx_TD, stats_KT = frozen_head(hidden_TD, head, labels_T, slice_columns=columns, **common)
    else:
        mass_columns = COLUMNS if want.tile_mass else None
        found = score_rows(hidden_TD, head, labels_T, mass_columns=mass_columns, **common)
        logps_T, lse_T, stats_KT, mass_TC = found.logps_T, found.lse_T, found.token_stats_KT, found.mass_TC
    if stats_KT is not None:
        stats_KT = torch.stack([stats_KT[STATS.index(name)] for name in want.stats])
    return Scores(logps_T, lse_T, dx_TD, stats_KT, mass_TC)


def backward(
    grad_logps_T: Tensor,
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    lse_T: Tensor,
    *,
    ignore_index: int,
    needs: Needs,
) -> Gradients:
    """See ``dpo_kernels.linear_logps.interface``."""
    tiles, V = needs.tiles, head.weight_VD.shape[0]
    lists = None
    if tiles is not None:
        lists = TileLists.make(tiles.kept_BC, rows=FILTER_ROWS, columns=COLUMNS)
        hidden_TD, labels_T, lse_T, grad_logps_T = (
            t[tiles.order_T] for t in (hidden_TD, labels_T, lse_T, grad_logps_T)
        )
    # The copy of the hidden states comes out of the slice's share.
    width = min(V, slice_columns(hidden_TD, taken=0 if tiles is None else hidden_TD.nbytes))
    slice_Tv = empty_exps(hidden_TD, width)
    results = _Results.make(hidden_TD, head, needs)
    for start in range(0, V, width):
        columns = slice(start, min(V, start + width))
        part = head.columns(columns)
        gradient_Tv = slice_Tv[: len(hidden_TD), : columns.stop - start]
        slice_grad(
            hidden_TD,
            part,
            labels_T,
            lse_T,
            grad_logps_T,
            slice_Tv,
            first_col=start,
            ignore_index=ignore_index,
            lists=lists,
        )
        if lists is None:
            _add_products(results, gradient_Tv, hidden_TD, part.weight_VD, columns)
        else:
            _add_kept_products(results, gradient_Tv, hidden_TD, part.weight_VD, columns, lists)
    dX_TD = results.dX_TD
    if dX_TD is not None:
        if tiles is not None:
            del slice_Tv, gradient_Tv
        dX_TD = dX_TD.to(hidden_TD.dtype)
        if tiles is not None:
            dX_TD = torch.empty_like(dX_TD).index_copy_(0, tiles.order_T, dX_TD)
    return Gradients(dX_TD, results.dW_VD, results.db_V)


class _Results(NamedTuple):
    """What backward fills slice by slice, None for what is not needed."""

    dX_TD: Tensor | None
    """fp32, summed over the slices."""
    dW_VD: Tensor | None
    weight_grad_VD: Tensor | None
    """Takes the place of dW_VD, which is added to it."""
    db_V: Tensor | None

    @classmethod
    def make(cls, hidden_TD: Tensor, head: Head, needs: Needs) -> _Results:
        weight_grad_VD = needs.weight_grad_VD if needs.weight else None
        dW_VD = db_V = None
        if needs.weight and weight_grad_VD is None:
            dW_VD = head.weight_VD.new_empty(head.weight_VD.shape)
        if needs.bias and head.bias_V is not None:
            db_V = head.bias_V.new_empty(head.bias_V.shape)
        dX_TD = hidden_TD.new_empty(hidden_TD.shape, dtype=torch.float32) if needs.hidden else None
        return cls(dX_TD, dW_VD, weight_grad_VD, db_V)


def _add_products(results: _Results, gradient_Tv: Tensor, hidden_TD: Tensor, weight_vD: Tensor, columns: slice) -> None:
    """A slice whose gradient is there as a whole, by the library's products."""
    if results.dX_TD is not None:
        add_product_(results.dX_TD, gradient_Tv, weight_vD, first=columns.start == 0)
    if results.weight_grad_VD is not None:
        add_product_(results.weight_grad_VD[columns], gradient_Tv.T, hidden_TD)
    if results.dW_VD is not None:
        torch.mm(gradient_Tv.T, hidden_TD, out=results.dW_VD[columns])
    if results.db_V is not None:
        results.db_V[columns] = gradient_Tv.sum(dim=0, dtype=torch.float32)


def _add_kept_products(
    results: _Results, gradient_Tv: Tensor, hidden_TD: Tensor, weight_vD: Tensor, columns: slice, lists: TileLists
) -> None:
    """A slice of whose gradient only kept tiles are there."""
    first = columns.start
    if results.dX_TD is not None:
        add_filtered_dx_(results.dX_TD, gradient_Tv, weight_vD, lists, first_col=first)
    for out_VD in (results.dW_VD, results.weight_grad_VD):
        if out_VD is not None:
            accumulate = out_VD is results.weight_grad_VD
            filtered_dw(out_VD[columns], gradient_Tv, hidden_TD, lists, first_col=first, accumulate=accumulate)
    if results.db_V is not None:
        filtered_db(results.db_V[columns], gradient_Tv, lists, first_col=first)


def forward_workspace(hidden_TD: Tensor, weight_VD: Tensor, need_dx: bool) -> int:
    """Most bytes that ``forward`` holds beyond its inputs and results, without statistics of tokens."""
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    columns = min(V, slice_columns(hidden_TD)) if need_dx else V
    # A shift and a sum of each tile.
    partials = T * -(-columns // _partial_width(hidden_TD, weight_VD, frozen=need_dx)) * 8
    if not need_dx:
        partials = min(PARTIAL_BYTES, partials)
    return partials + (_slice_bytes(hidden_TD, weight_VD) + hidden_TD.numel() * 4 if need_dx else 0)


def _partial_width(hidden_TD: Tensor, weight_VD: Tensor, *, frozen: bool, token_stats: bool = False) -> int:
    """Columns that share a partial in forward, of the narrowest tiles: with a softcap or without."""
    kernel = "linear_exps" if frozen else "linear_stats"
    joined = frozen and not token_stats
    return min(
        partial_width(TileLaunch(kernel, hidden_TD, weight_VD, heavy=heavy), joined=joined) for heavy in (False, True)
    )


def backward_workspace(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """As ``forward_workspace``, for ``backward``."""
    return _slice_bytes(hidden_TD, weight_VD) + hidden_TD.numel() * 4


def _slice_bytes(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    columns = min(weight_VD.shape[0], slice_columns(hidden_TD))
    return _padded(hidden_TD.shape[0]) * _padded(columns) * hidden_TD.element_size()


def _padded(size: int) -> int:
    """Buffers of exponentials and gradients hold whole tiles."""
    return -(-size // MAX_BLOCK) * MAX_BLOCK


def slice_columns(hidden_TD: Tensor, *, taken: int = 0, stats_width: int | None = None) -> int:
    """Columns of a slice: SLICE_BYTES worth of them, less what is ``taken``, in whole tiles.

    Partials of statistics of tokens, one set for every ``stats_width`` columns, are part of a slice.
    """
    column_bytes = hidden_TD.element_size() + (4 * (2 + NUM_PARTIALS) / stats_width if stats_width else 0)
    columns = int((SLICE_BYTES - taken) / (_padded(hidden_TD.shape[0]) * column_bytes))
    return max(MIN_SLICE, full_waves(hidden_TD.shape[0], columns // 256, multiprocessors(hidden_TD.device)) * 256)


def full_waves(rows: int, most: int, processors: int | None) -> int:
    """Column tiles of a slice, at most ``most``: of the upper quarter, what leaves fewest multiprocessors idle.

    Each takes a tile of 128 rows and 256 columns, or as much, at a time: 64 x 33 tiles are 16 waves of 132 exactly.
    """
    if processors is None or most < 4:
        return most
    row_tiles = -(-rows // 128)
    widths = range(most, most - most // 4, -1)
    return max(widths, key=lambda width: row_tiles * width / -(-row_tiles * width // processors))
