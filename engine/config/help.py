"""Text about the configuration: what ``--help`` lists, and what a run prints at its start."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
from typing import Any, Literal, get_args, get_origin

import yaml

from .fields import choices, dataclass_in, dataclass_of_items, type_hints
from .load import diff_from_defaults, plain
from .schema import RunConfig

_REQUIRED = object()


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a configuration dataclass, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    name = None
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[name] = " ".join(str(node.value.value).replace("``", "").split())
        else:
            name = None
    return docs


def config_help(width: int | None = None) -> str:
    """Every configuration key as a flag, with its type, meaning and default, by section."""
    width = width or min(shutil.get_terminal_size().columns, 120)
    lines = ["configuration keys, in the file (section: {key: value}) or as flags (--section.key value):"]
    for name, hint in type_hints(RunConfig).items():
        section = dataclass_in(hint)
        assert section is not None
        lines += _section_help(section, name, width)
    return "\n".join(lines) + "\n"


def format_diff(config: RunConfig) -> str:
    """What ``config`` sets, one key a line, with the default where it has one."""
    rows = []
    for key, (value, default) in diff_from_defaults(config).items():
        rows.append(
            (key, inline(value), "" if default is None and value is not None else f"(default {inline(default)})")
        )
    left = max(len(key) for key, _, _ in rows)
    return "\n".join(f"{key:<{left}}  {value}  {note}".rstrip() for key, value, note in rows)


def inline(value: Any) -> str:
    """``value`` as YAML writes it inside a line."""
    return (
        yaml.safe_dump(plain(value), default_flow_style=True, width=10**6, allow_unicode=True)
        .removesuffix("...\n")
        .strip()
    )


def _section_help(cls: type, prefix: str, width: int) -> list[str]:
    summary = " ".join((cls.__doc__ or "").replace("``", "").split())
    lines = ["", *textwrap.wrap(f"{prefix}: {summary}", width)]
    docs, nested_sections = field_docs(cls), []
    for field in dataclasses.fields(cls):
        hint = type_hints(cls)[field.name]
        nested = dataclass_in(hint)
        if nested is not None:
            nested_sections += _section_help(nested, f"{prefix}.{field.name}", width)
            continue
        default = _default(field)
        note = "required" if default is _REQUIRED else f"default: {inline(default)}"
        if instead := field.metadata.get("needed_without"):
            note = f"required without {prefix}.{instead}"
        lines.append(f"  --{prefix}.{field.name} {_metavar(hint)}  ({note})")
        text = docs.get(field.name, "")
        if len(names := choices(hint)) > 1:
            text = f"{text} One of {', '.join(dict.fromkeys(names))}."
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines + nested_sections


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _REQUIRED if field.default is dataclasses.MISSING else field.default


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "NAME" if len(get_args(hint)) > 1 else str(get_args(hint)[0])
    if dataclass_of_items(hint) is not None:
        return "LIST"
    if get_origin(hint) is tuple:
        return f"{_metavar(get_args(hint)[0])} ..."
    if get_origin(hint) is dict:
        return "NAME VALUE ..."
    if {Literal, tuple} <= {get_origin(member) for member in get_args(hint)}:
        return "NAME ..."
    names = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false", type(None): "null"}
    return names[hint] if hint in names else "|".join(_metavar(member) for member in get_args(hint))
