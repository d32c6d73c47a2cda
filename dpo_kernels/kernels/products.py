"""Matrix products with fp32 results, for the library that is best at them."""

from __future__ import annotations

import torch


def add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool = False) -> None:
    """out += a @ b, or out = a @ b when `first`. An fp32 `out` of half a and b is summed in fp32 throughout."""
    if a.dtype != out.dtype and out.is_cuda and torch.version.hip is None:
        if first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)
