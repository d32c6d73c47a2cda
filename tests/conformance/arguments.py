"""The command line of ``python -m tests.conformance``."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NamedTuple

import transformers

from engine.config.schema import KernelName
from tests.conformance.families import model_types
from tests.conformance.table import path_of


class Chosen(NamedTuple):
    """What a command line asks for."""

    types: list[str]
    """Each a known one; none for the whole sweep."""
    kernels: KernelName
    """What computes the blocks."""


def chosen(arguments: Sequence[str] | None = None) -> Chosen:
    """What a command line asks for."""
    path = path_of(transformers.__version__)
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance", description="Try causal-LM families of transformers on packs."
    )
    parser.add_argument(
        "types",
        metavar="MODEL_TYPE",
        nargs="*",
        help=f"such as llama; without any the whole sweep, which writes {path.parent.name}/{path.name}",
    )
    parser.add_argument(
        "--kernels",
        choices=("none", "compile", "liger"),
        default="none",
        help="what computes the blocks, as model.kernels; the page is written with none alone",
    )
    options = parser.parse_args(arguments)
    types = options.types
    known = model_types()
    for name in types:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            parser.error(f"unknown model type {name}" + (f"; did you mean {close[0]}?" if close else ""))
    return Chosen(types, options.kernels)
