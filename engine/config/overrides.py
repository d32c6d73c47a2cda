"""Command-line overrides of configuration keys: ``--loss.beta 0.2``, ``--model.lora.r=8``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any, get_args

import yaml

from ..errors import UserError
from .fields import (
    TypeMismatch,
    coerce,
    dataclass_in,
    dataclass_of_items,
    describe,
    is_mapping,
    is_optional,
    is_tuple,
    iter_keys,
    nearest,
    suggestion,
    type_hints,
)
from .schema import RunConfig

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_NULL = {"null", "none", "~"}


def parse_overrides(args: Sequence[str]) -> dict[str, Any]:
    """Values by dotted key, in the order given; the last of several values for one key counts.

    Accepts ``--key value``, ``--key=value``, several values for a list, no value for a switch (true), and hyphens in
    place of underscores. ``null`` clears a key that may be empty.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a stray argument.
    """
    hints = dict(iter_keys())
    sections = {f"{path}.{name}": hint for path, cls in _sections() for name, hint in type_hints(cls).items()}
    values: dict[str, Any] = {}
    for flag, tokens in _split(args):
        key = flag[2:].replace("-", "_")
        owner = key.rpartition(".")[0]
        if (hint := _hint_of(key, hints)) is not None:
            values[key] = _parse_value(key, hint, tokens)
        elif is_mapping(mapping := _hint_of(owner, hints)):
            # One entry of a mapping, beside those of the file.
            values[key] = _one_value(key, mapping, tokens)
        elif key in sections and dataclass_in(sections[key]) is not None:
            if len(tokens) != 1 or tokens[0].lower() not in _NULL:
                raise UserError(f"--{key}: expected null to turn it off, or one of its keys such as --{key}.r 16")
            values = {k: v for k, v in values.items() if not k.startswith(key + ".")}
            values[key] = None
        else:
            raise UserError(unknown_flag(flag, [f"--{k}" for k in hints]))
    return values


def unknown_flag(flag: str, known: Sequence[str]) -> str:
    """The message for a flag that does not exist."""
    close = nearest(flag.lstrip("-").replace("-", "_"), [k.lstrip("-") for k in known])
    hint = f"did you mean --{close}?" if close else "see --help for every flag"
    return f"unknown option {flag}; {hint}"


def _sections() -> list[tuple[str, type]]:
    found = []
    for name, hint in type_hints(RunConfig).items():
        if (cls := dataclass_in(hint)) is not None:
            found.append((name, cls))
    return found


def _split(args: Sequence[str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    for arg in args:
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(arg)
        else:
            raise UserError(f"unexpected argument {arg!r}; overrides look like --loss.beta 0.2")
    return groups


def _parse_value(key: str, hint: Any, tokens: list[str]) -> Any:
    boolean = hint is bool or bool in get_args(hint)
    if boolean and not tokens:
        return True
    if dataclass_of_items(hint) is not None and len(tokens) == 1:
        return _listed(key, tokens[0])
    is_null = len(tokens) == 1 and tokens[0].lower() in _NULL
    if is_tuple(hint) and (is_null or tokens == ["[]"]):
        return ()
    if is_null and is_optional(hint):
        return None
    try:
        if not tokens:
            raise SystemExit
        if is_mapping(hint) and len(tokens) == 1:
            # Beside a mapping a name may be meant, which is not read as YAML.
            names = str in get_args(hint) and not tokens[0].lstrip().startswith("{")
            return coerce(tokens[0] if names else yaml.safe_load(tokens[0]), hint)
        return _parse_with_tyro(hint, [_boolean(t) for t in tokens] if boolean else tokens)
    except (SystemExit, TypeMismatch, yaml.YAMLError):
        got = " ".join(tokens) if tokens else "no value"
        raise UserError(f"--{key}: expected {describe(hint)}, got {got}{suggestion(tokens, hint)}") from None


def _hint_of(key: str, hints: dict[str, Any]) -> Any:
    """The type of a key, also of one item of a list, such as data.datasets.0.weight; None where there is none."""
    if key in hints:
        return hints[key]
    place = re.fullmatch(r"(.+)\.\d+\.(\w+)", key)
    items = dataclass_of_items(hints.get(place[1])) if place else None
    return type_hints(items).get(place[2]) if place and items is not None else None


def _listed(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"--{key}: expected a list in one argument, such as '[{{name: a.jsonl}}]', got {text}"
        ) from None


def _one_value(key: str, hint: Any, tokens: list[str]) -> Any:
    """A value of a mapping, as YAML reads it."""
    try:
        if len(tokens) != 1:
            raise TypeMismatch("one value")
        return coerce({"entry": yaml.safe_load(tokens[0])}, hint)["entry"]
    except (TypeMismatch, yaml.YAMLError):
        raise UserError(f"--{key}: expected one name or number, got {' '.join(tokens) or 'no value'}") from None


def _boolean(token: str) -> str:
    """YAML's spellings of true and false in tyro's."""
    lowered = token.lower()
    return "True" if lowered in _TRUE else "False" if lowered in _FALSE else token


def _parse_with_tyro(hint: Any, tokens: list[str]) -> Any:
    """``tokens`` as an instance of ``hint``.

    Raises:
        SystemExit: they do not fit.
    """
    # imported here, since it is the slowest part of `dpo --help`
    import tyro

    cls = dataclasses.make_dataclass("Value", [("value", hint)])
    # the equals sign keeps a value that begins with a hyphen from being read as a flag
    args = [f"--value={tokens[0]}"] if len(tokens) == 1 else ["--value", *tokens]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(cls, args=args, config=(tyro.conf.FlagConversionOff,)).value
