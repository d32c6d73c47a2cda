"""What is tuned: the launches that the ops make at a model's shape, on tensors of the tuner's own.

Legend: N rows, D hidden size, V columns of one launch: the vocabulary, or a slice of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_kernels.head import Head
from dpo_kernels.kernels.slice_grad import slice_grad
from dpo_kernels.kernels.softmax_grad import softmax_grad_
from dpo_kernels.kernels.tile_config import TileConfig, tile_config
from dpo_kernels.kernels.tile_logps import LinearStats, empty_exps, linear_stats, tile_stats
from dpo_kernels.kernels.token_stats import TOKEN_STATS
from dpo_kernels.linear_dpo.triton_pairs import chunk_rows
from dpo_kernels.linear_logps.triton_tiles import slice_columns

IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """One launch."""

    kernel: str
    dtype: torch.dtype
    N: int
    D: int
    V: int
    heavy: bool

    def bounds(self) -> tuple[tuple[str, int], ...]:
        """The bucket: sizes above half and up to a power of two, and rows that descriptors can load."""
        bounds: dict[str, int] = {}
        for name, size in (("D", self.D), ("V", self.V)):
            high = 1 << (size - 1).bit_length()
            bounds |= {f"min_{name}": high // 2 + 1, f"max_{name}": high}
        aligned = self.D * self.dtype.itemsize % 16 == 0
        return tuple((bounds | {"heavy": self.heavy, "aligned": aligned}).items())

    def shipped(self, arch: str) -> TileConfig:
        """The configuration without a table of the user's."""
        aligned = bool(dict(self.bounds())["aligned"])
        return tile_config(
            self.kernel,
            arch=arch,
            dtype=self.dtype,
            D=self.D,
            V=self.V,
            heavy=self.heavy,
            aligned=aligned,
            shipped=True,
        )


def problem_groups(
    kernels: Sequence[str], shapes: Sequence[tuple[int, int]], *, dtype: torch.dtype, rows: int, heavy: bool
) -> list[list[Problem]]:
    """The launches that the ops make for heads of `shapes` (hidden size, vocabulary), those of one bucket together."""
    groups: dict[tuple[object, ...], list[Problem]] = {}
    for kernel in kernels:
        for D, V in shapes:
            for problem in _problems(kernel, dtype, rows, D, V, heavy):
                group = groups.setdefault((kernel, problem.bounds()), [])
                if problem not in group:
                    group.append(problem)
    return list(groups.values())


def _problems(kernel: str, dtype: torch.dtype, rows: int, D: int, V: int, heavy: bool) -> list[Problem]:
    hidden = torch.empty(rows, D, dtype=dtype, device="meta")
    narrow = Problem(kernel, dtype, rows, D, min(V, slice_columns(hidden)), heavy)
    if kernel == "linear_stats":
        return [Problem(kernel, dtype, rows, D, V, heavy)]
    if kernel == "linear_exps":
        # The paired loss takes chunks of rows, the frozen head slices of the vocabulary.
        weight = torch.empty(V, D, dtype=dtype, device="meta")
        return [Problem(kernel, dtype, min(rows, chunk_rows(hidden, weight, heavy=heavy)), D, V, heavy), narrow]
    assert kernel == "slice_grad", kernel
    return [narrow]


class Workload:
    """Tensors of one problem, in one place, and its launches.

    On `meta` tensors nothing is computed: they are for `launch_heaviest`.
    """

    def __init__(self, problem: Problem, device: torch.device):
        self.problem = problem
        N, D, V, dtype = problem.N, problem.D, problem.V, problem.dtype
        meta = device.type == "meta"
        generator = None if meta else torch.Generator(device).manual_seed(0)
        self.hidden_ND = torch.randn(N, D, device=device, generator=generator, dtype=dtype)
        # Logits of order 1, as a model's are.
        weight_VD = torch.randn(V, D, device=device, generator=generator, dtype=dtype).mul_(D**-0.5)
        self.head = Head(weight_VD, softcap=30.0 if problem.heavy else None)
        self.labels_N = torch.randint(V, (N,), device=device, generator=generator)
        self.row_N = torch.ones(N, device=device)
        self.buffer = self.hidden_ND.new_empty(0)
        self.lse_N = self.row_N.double()
        if problem.kernel != "linear_stats":
            self.buffer = empty_exps(self.hidden_ND, V)
        if problem.kernel == "slice_grad" and not meta:
            self.lse_N = self._stats(None).lse_N

    def launch(self, config: TileConfig) -> LinearStats | None:
        """What is timed."""
        if self.problem.kernel == "slice_grad":
            self._slice_grad(self.head, config)
            return None
        return self._stats(config)

    def launch_heaviest(self, config: TileConfig) -> None:
        """With everything on that the configuration has to serve: what compilation is checked with."""
        head = self.head._replace(bias_V=self.head.weight_VD.new_empty(self.problem.V))
        if self.problem.kernel == "slice_grad":
            self._slice_grad(head, config)
            return
        exps = self.buffer if self.problem.kernel == "linear_exps" else None
        tile_stats(
            self.hidden_ND,
            head,
            self.labels_N,
            self.row_N,
            exps=exps,
            row_shift_N=None if exps is None else self.row_N,
            token_stats=self.problem.heavy,
            config=config,
        )

    def result(self, config: TileConfig) -> list[torch.Tensor]:
        """What the launch computes, in a form that does not depend on tile shapes; gradients lie in the buffer."""
        self.buffer.fill_(float("nan"))
        stats = self.launch(config)
        if stats is None:
            return [self.buffer[: self.problem.N, : self.problem.V]]
        numbers = [stats.logps_N, stats.lse_N]
        if stats.token_stats_KN is not None:
            # A hit may be won or lost by rounding, where two logits are near equal.
            numbers += [
                row_N for name, row_N in zip(TOKEN_STATS, stats.token_stats_KN, strict=True) if name != "is_top1"
            ]
        if self.problem.kernel == "linear_stats":
            return numbers
        gradient_NV = softmax_grad_(
            self.buffer,
            self.row_N,
            self.head,
            self.labels_N,
            stats,
            ignore_index=IGNORED,
        )
        return [*numbers, gradient_NV]

    def _slice_grad(self, head: Head, config: TileConfig) -> None:
        slice_grad(
            self.hidden_ND,
            head,
            self.labels_N,
            self.lse_N,
            self.row_N,
            self.buffer,
            first_col=0,
            ignore_index=IGNORED,
            config=config,
        )

    def _stats(self, config: TileConfig | None) -> LinearStats:
        return linear_stats(
            self.hidden_ND,
            self.head,
            self.labels_N,
            ignore_index=IGNORED,
            exps=self.buffer if self.problem.kernel == "linear_exps" else None,
            token_stats=self.problem.heavy and self.problem.kernel != "slice_grad",
            config=config,
        )
