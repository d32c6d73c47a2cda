"""What ``dpo`` and ``python -m dpo_engine`` run: the command line, or one line that says which packages it lacks.

``pip install dpo-kernels`` brings the loss ops and torch alone, yet it installs the command. So this module imports
nothing but the standard library before it has looked.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import NoReturn

NEEDED = (
    "datasets",
    "jinja2",
    "matplotlib",
    "numpy",
    "psutil",
    "pyarrow",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "tqdm",
    "transformers",
    "tyro",
    "yaml",
)
"""Modules of the extra ``train``, beside torch."""


def command() -> NoReturn:
    """Run the command line and end the process with its exit code; 2 where packages of the engine are missing."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        print(
            f"error: dpo needs packages that are not installed: {', '.join(absent)}; "
            'run: pip install "dpo-kernels[train]"',
            file=sys.stderr,
        )
        sys.exit(2)
    from .cli import command as run

    run()


if __name__ == "__main__":
    command()
