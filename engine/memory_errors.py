"""What to lower where memory runs out, told in place of the library's own error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from .config.schema import RunConfig
from .errors import UserError, out_of_memory

P = ParamSpec("P")
T = TypeVar("T")


def remedies(config: RunConfig, *, trains: bool = True) -> str:
    """What to change, beginning with what costs least and changes no result."""
    found = [f"lower packing.tokens_per_pack (now {config.packing.tokens_per_pack:,})"]
    if trains and config.train.gradient_checkpointing is not True:
        found.append("set train.gradient_checkpointing to true")
    if trains and not (config.train.activation_offload or config.train.gradient_checkpointing):
        found.append("set train.activation_offload to true")
    found.append("use more processes" if config.model.quantization is None else "use a larger device")
    if trains and not config.model.trains_adapter:
        found.append("train an adapter (model.lora)")
    return ", ".join(found[:-1]) + f", or {found[-1]}"


@contextmanager
def memory_errors(config: RunConfig, *, trains: bool = False, figures: Callable[[], str] = str) -> Iterator[None]:
    """Turn running out of memory into a ``UserError`` that says what to lower.

    Args:
        figures: what was forecast, in words, where anything was; asked when memory has run out.
    """
    try:
        yield
    except Exception as error:
        what = out_of_memory(error)
        if what is None or isinstance(error, UserError):
            raise
        told = f" ({words})" if (words := figures()) else ""
        raise UserError(f"out of {what}{told}: {remedies(config, trains=trains)}") from error


def advised(function: Callable[Concatenate[RunConfig, P], T]) -> Callable[Concatenate[RunConfig, P], T]:
    """``function`` without gradients under ``memory_errors``."""

    @wraps(function)
    def run(config: RunConfig, *args: P.args, **kwargs: P.kwargs) -> T:
        with memory_errors(config):
            return function(config, *args, **kwargs)

    return run
