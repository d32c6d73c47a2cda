"""These files run only in a process that set TRITON_INTERPRET=1; `test_interpreted.py` beside this folder starts it."""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


if not collect_ignore_glob:
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    # As on a GPU: of a nan and a number the number.
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def pytest_configure(config: pytest.Config) -> None:
    # numpy reports what lanes beyond the mask compute.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
