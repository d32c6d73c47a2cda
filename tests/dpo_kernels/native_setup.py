"""The native implementation, where its library was built: it takes float32 and 16-bit inputs, not float64."""

from __future__ import annotations

from dpo_kernels import native

NATIVE = ("native",) if native.library() is not None else ()
