"""Plain twins of the kernels, in float64, and the rule that bounds a kernel's error."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import torch

from dpo_kernels.head import Head
from dpo_kernels.kernels.tile_config import TileConfig
from dpo_kernels.kernels.tile_logps import RowScores, score_rows
from dpo_kernels.linear_logps.reference import logps as reference_logps

IGNORED = -100


@dataclass
class Problem:
    """Inputs of one call."""

    hidden: torch.Tensor
    head: Head
    labels: torch.Tensor

    @classmethod
    def make(
        cls,
        N: int,
        V: int,
        D: int = 24,
        dtype: torch.dtype = torch.float32,
        *,
        bias: bool = False,
        scale: float = 1.0,
        ignored: bool = True,
        **options: float,
    ) -> Problem:
        labels = torch.randint(0, V, (N,))
        if ignored:
            labels[torch.rand(N) < 0.2] = IGNORED
        bias_V = torch.randn(V).to(dtype) if bias else None
        hidden, weight = (scale * torch.randn(N, D)).to(dtype), torch.randn(V, D).to(dtype)
        return cls(hidden, Head(weight, bias_V, **options), labels)

    @property
    def weight(self) -> torch.Tensor:
        return self.head.weight_VD

    def set_bias(self, bias_V: torch.Tensor) -> None:
        self.head = self.head._replace(bias_V=bias_V)

    def stats(self, config: TileConfig | None, **outputs: Any) -> RowScores:
        """What `linear_stats` finds, with `outputs` such as exps."""
        return score_rows(self.hidden, self.head, self.labels, ignore_index=IGNORED, config=config, **outputs)

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
        """(logps, lse, hidden, weight, bias): leaves in `dtype`, log-probs differentiable."""
        leaves = [self.hidden, self.weight, self.head.bias_V]
        hidden, weight, bias = [None if t is None else t.detach().clone().to(dtype).requires_grad_() for t in leaves]
        head = self.head._replace(weight_VD=weight, bias_V=bias)
        logps, lse = reference_logps(hidden, head, self.labels, IGNORED)
        return logps, lse, hidden, weight, bias

    def product_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        """d(sum upstream * logps) / d(hidden @ weight.T), [N, V], in float64."""
        products = (self.hidden.double() @ self.weight.double().T).requires_grad_()
        eye = torch.eye(len(self.weight), dtype=torch.float64)
        bias = None if self.head.bias_V is None else self.head.bias_V.double()
        logps, _ = reference_logps(products, self.head._replace(weight_VD=eye, bias_V=bias), self.labels, IGNORED)
        return torch.autograd.grad((logps * upstream.double()).sum(), products)[0]


def assert_as_good(got: torch.Tensor, rival: torch.Tensor, exact: torch.Tensor, floor: float, factor: float = 2.0):
    """Largest error at most `factor` times that of same-dtype torch, or `floor` times the largest value."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs().max().item() if got.numel() else 0.0
    allowed = (rival.double() - exact).abs().max().item() * factor if got.numel() else 0.0
    largest = max(1e-30, exact.abs().max().item() if got.numel() else 0.0)
    limit = max(allowed, floor * largest)
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}, largest value {largest:.3g}"


def rounding(dtype: torch.dtype) -> float:
    """Relative rounding error. The interpreter truncates where it stores bfloat16, which doubles it."""
    return torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 else 0.5)


def far_rows(rows: int, columns: int, row_stride: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A matrix whose rows lie `row_stride` elements apart, of which only the pages that are touched get memory."""
    size = ((rows - 1) * row_stride + columns) * dtype.itemsize
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=dtype).as_strided((rows, columns), (row_stride, 1))
