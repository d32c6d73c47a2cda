"""What is tuned: the launches that the ops make at a model's shape, on tensors of the tuner's own.

Legend: T rows, D hidden size, V columns of one launch: the vocabulary, or a slice of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_kernels.head import Head
from dpo_kernels.kernels.slice_grad import slice_grad
from dpo_kernels.kernels.softmax_grad import softmax_grad_
from dpo_kernels.kernels.tile_config import TileConfig, tile_config
from dpo_kernels.kernels.tile_logps import RowScores, empty_exps, score_rows, tile_partials
from dpo_kernels.kernels.token_stats import TOKEN_STATS
from dpo_kernels.linear_dpo.triton_pairs import chunk_rows
from dpo_kernels.linear_logps.triton_tiles import slice_columns

IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """One launch."""

    kernel: str
    dtype: torch.dtype
    T: int
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
        T, D, V, dtype = problem.T, problem.D, problem.V, problem.dtype
        meta = device.type == "meta"
        generator = None if meta else torch.Generator(device).manual_seed(0)
        self.hidden_TD = torch.randn(T, D, device=device, generator=generator, dtype=dtype)
        # Logits of order 1, as a model's are.
        weight_VD = torch.randn(V, D, device=device, generator=generator, dtype=dtype).mul_(D**-0.5)
        self.head = Head(weight_VD, softcap=30.0 if problem.heavy else None)
        self.labels_T = torch.randint(V, (T,), device=device, generator=generator)
        self.row_T = torch.ones(T, device=device)
        self.buffer = self.hidden_TD.new_empty(0)
        self.lse_T = self.row_T.double()
        if problem.kernel != "linear_stats":
            self.buffer = empty_exps(self.hidden_TD, V)
        if problem.kernel == "slice_grad" and not meta:
            self.lse_T = self._scores(None).lse_T

    def launch(self, config: TileConfig) -> RowScores | None:
        """What is timed."""
        if self.problem.kernel == "slice_grad":
            self._slice_grad(self.head, config)
            return None
        return self._scores(config)

    def launch_heaviest(self, config: TileConfig) -> None:
        """With everything on that the configuration has to serve: what compilation is checked with."""
        head = self.head._replace(bias_V=self.head.weight_VD.new_empty(self.problem.V))
        if self.problem.kernel == "slice_grad":
            self._slice_grad(head, config)
            return
        exps = self.buffer if self.problem.kernel == "linear_exps" else None
        tile_partials(
            self.hidden_TD,
            head,
            self.labels_T,
            self.row_T,
            exps=exps,
            row_shift_T=None if exps is None else self.row_T,
            token_stats=self.problem.heavy,
            config=config,
        )

    def result(self, config: TileConfig) -> list[torch.Tensor]:
        """What the launch computes, in a form that does not depend on tile shapes; gradients lie in the buffer."""
        self.buffer.fill_(float("nan"))
        scores = self.launch(config)
        if scores is None:
            return [self.buffer[: self.problem.T, : self.problem.V]]
        numbers = [scores.logps_T, scores.lse_T]
        if scores.token_stats_KT is not None:
            # A hit may be won or lost by rounding, where two logits are near equal.
            numbers += [
                row_T for name, row_T in zip(TOKEN_STATS, scores.token_stats_KT, strict=True) if name != "is_top1"
            ]
        if self.problem.kernel == "linear_stats":
            return numbers
        gradient_TV = softmax_grad_(
            self.buffer,
            self.row_T,
            self.head,
            self.labels_T,
            scores,
            ignore_index=IGNORED,
        )
        return [*numbers, gradient_TV]

    def _slice_grad(self, head: Head, config: TileConfig) -> None:
        slice_grad(
            self.hidden_TD,
            head,
            self.labels_T,
            self.lse_T,
            self.row_T,
            self.buffer,
            first_col=0,
            ignore_index=IGNORED,
            config=config,
        )

    def _scores(self, config: TileConfig | None) -> RowScores:
        return score_rows(
            self.hidden_TD,
            self.head,
            self.labels_T,
            ignore_index=IGNORED,
            exps=self.buffer if self.problem.kernel == "linear_exps" else None,
            token_stats=self.problem.heavy and self.problem.kernel != "slice_grad",
            config=config,
        )
