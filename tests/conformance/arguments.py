"""The command line of ``python -m tests.conformance``."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

import transformers

from tests.conformance.families import model_types
from tests.conformance.table import path_of


def chosen_types(arguments: Sequence[str] | None = None) -> list[str]:
    """The model types that a command line names, each a known one; none for the whole sweep."""
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
    types = parser.parse_args(arguments).types
    known = model_types()
    for name in types:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            parser.error(f"unknown model type {name}" + (f"; did you mean {close[0]}?" if close else ""))
    return types
