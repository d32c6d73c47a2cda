"""The configuration schema as data: its keys, and strict conversion of YAML values to their types."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .schema import RunConfig


class TypeMismatch(Exception):  # noqa: N818 - always caught and reworded, never shown
    """A value that does not fit its type. ``expected`` is a phrase for people."""

    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """Resolved field types of a configuration dataclass, in order."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def dataclass_in(hint: Any) -> type | None:
    """The dataclass of ``X`` or ``X | None``, else None."""
    if is_tuple(hint):
        return None
    for candidate in (hint, *get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def dataclass_of_items(hint: Any) -> type | None:
    """The dataclass of ``tuple[X, ...]``, else None."""
    return dataclass_in(get_args(hint)[0]) if is_tuple(hint) else None


def is_optional(hint: Any) -> bool:
    """Whether null fits ``hint``."""
    return type(None) in get_args(hint)


def is_tuple(hint: Any) -> bool:
    """Whether ``hint`` is a tuple of any length and nothing else."""
    return get_origin(hint) is tuple


def is_mapping(hint: Any) -> bool:
    """Whether ``hint`` is a mapping, or one that may be left out."""
    return any(get_origin(member) is dict for member in (hint, *get_args(hint)))


def iter_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every settable key with its type, such as ``("model.lora.r", int)``, in the order of the schema."""
    for name, hint in type_hints(cls).items():
        nested = dataclass_in(hint)
        if nested is None:
            yield prefix + name, hint
        else:
            yield from iter_keys(nested, f"{prefix}{name}.")


_SYNONYMS = {"dpo": "sigmoid", "cdpo": "sigmoid", "flash_attention_2": "flash", "bf16": "bfloat16", "fp32": "float32"}
"""What people know a choice by, where its letters do not lead to its name."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that ``name`` was probably meant to be.

    A dotted candidate also matches by its last part alone, so that ``beta`` and ``optim.beta`` find ``loss.beta``.
    """
    known = list(candidates)
    leaf = name.rsplit(".", 1)[-1]
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    if leaf in by_leaf:
        return by_leaf[leaf]
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return close[0]
    close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
    return by_leaf[close[0]] if close else None


def choices(hint: Any) -> list[str]:
    """The names that ``hint`` allows; empty when it is not a choice."""
    if get_origin(hint) is Literal:
        return [str(a) for a in get_args(hint)]
    return [name for member in get_args(hint) for name in choices(member)]


def suggestion(value: Any, hint: Any) -> str:
    """``; did you mean NAME?`` for a misspelt choice, else nothing."""
    words = value if isinstance(value, (list, tuple)) else [value]
    for word in words:
        if not isinstance(word, str) or word in choices(hint):
            continue
        synonym = _SYNONYMS.get(word.lower())
        close = synonym if synonym in choices(hint) else nearest(word, choices(hint))
        if close:
            return f"; did you mean {close}?"
    return ""


def describe(hint: Any) -> str:
    """``hint`` in words, for error messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if dataclass_of_items(hint) is not None:
        return "a list of mappings"
    if origin is tuple:
        return f"a list ({describe(args[0])})"
    if origin is dict:
        return "a mapping of names to numbers or strings"
    if origin in (Union, types.UnionType):
        parts = [describe(a) for a in args if a is not type(None)]
        if len(parts) == 2 and parts[1] == f"a list ({parts[0]})":
            parts[1] = "a list of them"
        return " or ".join(parts + (["null"] if is_optional(hint) else []))
    if dataclass_in(hint) is not None:
        return "a mapping"
    return {str: "a string", int: "an integer", float: "a number", bool: "true or false"}[hint]


def show(value: Any) -> str:
    """A YAML value in words, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    if len(text) > 60:
        text = text[:57] + "..."
    kinds = {str: "the string", int: "the integer", float: "the number", list: "the list", dict: "the mapping"}
    return f"{kinds[type(value)]} {text}" if type(value) in kinds else f"{type(value).__name__} {text}"


def coerce(value: Any, hint: Any) -> Any:
    """``value``, as YAML gives it, as an instance of ``hint``.

    Strict, but for what YAML makes awkward: a whole number and a string such as ``1e-6`` (a string in YAML 1.1) fit a
    float, and a lone item fits a list.

    Raises:
        TypeMismatch: it does not fit.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
    elif origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return tuple(_each(items, args[0], hint))
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return dict(zip(value, _each(list(value.values()), args[1], hint), strict=True))
    elif origin in (Union, types.UnionType):
        return _coerce_union(value, args, hint)
    elif hint is float:
        if type(value) in (int, float, str):
            return _finite(value)
    elif type(value) is hint:
        return value
    raise TypeMismatch(describe(hint))


def _each(items: list[Any], hint: Any, whole: Any) -> list[Any]:
    try:
        return [coerce(item, hint) for item in items]
    except TypeMismatch:
        raise TypeMismatch(describe(whole)) from None


def _coerce_union(value: Any, members: tuple[Any, ...], whole: Any) -> Any:
    exact = [m for m in members if type(value) is m]
    for member in exact + [m for m in members if m is not type(None)]:
        if member is type(None):
            return None
        try:
            # None would otherwise be taken for an empty list
            if value is not None:
                return coerce(value, member)
        except TypeMismatch:
            continue
    raise TypeMismatch(describe(whole))


def _finite(value: int | float | str) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise TypeMismatch(describe(float)) from None
    if not math.isfinite(number):
        raise TypeMismatch("a finite number")
    return number
