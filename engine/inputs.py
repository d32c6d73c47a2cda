"""Whether the models and data that a configuration names are there, before any of them is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from .config.schema import RunConfig
from .data import check_files
from .errors import raise_all
from .model.sources import check_folder


def check_inputs(
    config: RunConfig,
    *,
    splits: Sequence[str] = ("train", "eval"),
    tokenizer_only: bool = False,
    first_rows: bool = False,
) -> None:
    """Look for every local model and data file of a run; what is on the Hub waits.

    Args:
        splits: which data is needed, where it is set.
        tokenizer_only: no model is needed, but its tokenizer.
        first_rows: also look at the first row of the data, which a layout must have.

    Raises:
        UserError: for each that is missing, all at once.
    """
    data = partial(check_files, config.data, splits=splits, first_rows=first_rows)
    raise_all([*_models(config, tokenizer_only), data])


def _models(config: RunConfig, tokenizer_only: bool) -> Iterator[Callable[[], None]]:
    model = config.model
    named = {"model.tokenizer_name_or_path": model.tokenizer_name_or_path}
    if not tokenizer_only or model.tokenizer_name_or_path is None:
        named["model.model_name_or_path"] = model.model_name_or_path
    if not tokenizer_only:
        named["model.adapter_name_or_path"] = model.adapter_name_or_path
        named["reference.model_name_or_path"] = config.reference.model_name_or_path
    for option, source in named.items():
        if source is not None:
            yield partial(check_folder, source, f"{option}=")
