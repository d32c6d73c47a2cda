"""Liger's own kernels in Triton's interpreter, in a process that set TRITON_INTERPRET=1 before triton was imported."""

from __future__ import annotations

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from engine.model.kernels import liger


def liger_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let Liger's layers be used whatever the device, and mend what the interpreter lacks for them."""
    patch.setattr(liger, "DEVICES", ("cpu",))
    convert = interpreter._implicit_cvt

    def with_scalars(arg):
        # as a compiled kernel is given them; the interpreter leaves a Python float as it is
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert(arg)

    patch.setattr(interpreter, "_implicit_cvt", with_scalars)
    # of the device's library, which the interpreter does not have
    patch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: 1 / tl.sqrt(x))
    patch.setattr("liger_kernel.ops.geglu.tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
