"""From a YAML file and command-line overrides to a validated ``RunConfig``, and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, raise_all
from .fields import (
    TypeMismatch,
    coerce,
    dataclass_in,
    dataclass_of_items,
    describe,
    is_optional,
    iter_keys,
    nearest,
    show,
    suggestion,
    type_hints,
)
from .overrides import parse_overrides
from .schema import RunConfig

RUN_FILE = "the YAML file of a run"
FOREIGN_FILE = "the configuration, command or script of another trainer"
_SAMPLES = {RUN_FILE: "sections such as `loss:`", FOREIGN_FILE: "keys such as `learning_rate: 5.0e-6`"}
_REMEDIES = {
    RUN_FILE: "`dpo init` writes one",
    FOREIGN_FILE: "write its settings as lines such as `beta: 0.1`, under TRL's names, and convert that",
}
_OTHER_KINDS = {".py": "a Python script", ".ipynb": "a notebook", ".sh": "a shell script"} | dict.fromkeys(
    (".jsonl", ".parquet", ".csv", ".arrow", ".gz", ".safetensors"), "data"
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run configuration in ``path``, apply ``overrides`` such as ``["--loss.beta", "0.2"]``, and validate it.

    Every section and key must exist in the schema and every value must have its type. Relative paths inside the file
    are relative to the current directory, not to the file.

    Raises:
        UserError: the file cannot be read, is not YAML, or does not fit the schema. The message names file, line, key.
    """
    values, lines = read_yaml(path)
    if "sweep" in values:
        raise UserError(f"{path} describes a sweep of several runs: `dpo sweep {path}` trains them")
    return build_from(str(path), values, lines, parse_overrides(overrides))


def build_from(path: str, values: dict[str, Any], lines: dict[str, int], settings: Mapping[str, Any]) -> RunConfig:
    """The validated configuration of what a file holds, with ``settings`` by dotted key in place of its own.

    Args:
        values, lines: as ``read_yaml`` gives them; ``values`` is changed.

    Raises:
        UserError: as ``load_config``.
    """
    for key, value in settings.items():
        _set(values, key, value)
    return _Builder(path, lines, set(settings)).build(values)


def build_config(values: dict[str, Any], source: str) -> RunConfig:
    """The validated configuration of nested ``values``; ``source`` names them in errors.

    Raises:
        UserError: as ``load_config``.
    """
    return _Builder(source, {}, set()).build(values)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """``config`` as nested dicts of plain YAML types."""

    return plain(dataclasses.asdict(config))


def plain(value: Any) -> Any:
    """A value of the configuration as YAML types; of the items of a list, the keys that are set."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_given(plain(item)) for item in value]
    return plain(dataclasses.asdict(value)) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _given(item: Any) -> Any:
    return {k: v for k, v in item.items() if v not in (None, [])} if isinstance(item, dict) else item


def to_yaml(config: RunConfig) -> str:
    """``config`` as YAML that ``load_config`` reads back to an equal configuration."""
    values = to_dict(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if yaml.safe_load(text) != values:
        # PyYAML writes some line separators raw and reads them back as line ends; escaped, they survive
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=120)
    return text


def diff_from_defaults(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys of ``config`` that differ from their default: ``{"loss.beta": (0.2, 0.1)}``.

    A required key, and every key of a section that is off by default, is there with default ``None``.
    """
    return dict(_differences(config, ""))


def read_yaml(path: str | Path, expected: str = RUN_FILE) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file and the line of every dotted key.

    Args:
        expected: ``RUN_FILE`` or ``FOREIGN_FILE``.

    Raises:
        UserError: the file cannot be read, is not YAML, is not a mapping, or has a key twice.
    """
    return parse_yaml(path, read_text(path, expected), expected)


def read_text(path: str | Path, expected: str = RUN_FILE) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read, or is of a kind that cannot be what is expected.
    """
    kind = "a folder" if Path(path).is_dir() else _OTHER_KINDS.get(Path(path).suffix.lower())
    if kind is not None and not (expected == FOREIGN_FILE and Path(path).suffix.lower() in (".py", ".sh")):
        raise UserError(f"{path} is {kind}, where {expected} belongs; {_REMEDIES[expected]}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        advice = (
            f"write one with `dpo init --output {path}`" if expected == RUN_FILE else f"give the path of {expected}"
        )
        raise UserError(f"{path}: no such file; {advice}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_yaml(path: str | Path, text: str, expected: str = RUN_FILE) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in the ``text`` of a YAML file, and the line of every dotted key.

    Raises:
        UserError: it is not YAML, is not a mapping, or has a key twice.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path}: the file is empty; `dpo init` writes a template")
        lines: dict[str, int] = {}
        _index_lines(node, "", lines, str(path))
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_describe_yaml_error(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected {_SAMPLES[expected]}, got {show(values)}; {_REMEDIES[expected]}")
    return values, lines


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{where}: not valid YAML: {what}"


def _index_lines(node: yaml.Node, prefix: str, lines: dict[str, int], path: str) -> None:
    if prefix.count(".") > 5:
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
            _index_lines(item, f"{prefix}{index}.", lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = prefix + key.value, key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{path}, line {line}: {name} is already set in line {lines[name]}; remove one of them")
        lines[name] = line
        _index_lines(value, name + ".", lines, path)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for place, name in enumerate(parents):
        below = values.get(name)
        rest = [*parents, leaf][place + 1 :]
        if isinstance(below, list) and rest[0].isdigit():
            items = [dict(item) if isinstance(item, dict) else item for item in below]
            values[name] = items
            if int(rest[0]) >= len(items):
                raise UserError(f"--{key}: {'.'.join(parents[: place + 1])} has {len(items)} items, counted from 0")
            _set(items[int(rest[0])], ".".join(rest[1:]), value)
            return
        if not isinstance(below, dict):
            values[name] = {}
        values = values[name]
    values[leaf] = value


class _Builder:
    """Turns nested values into dataclasses and knows where each value came from."""

    def __init__(self, source: str, lines: dict[str, int], overridden: set[str]) -> None:
        self.source, self.lines, self.overridden = source, lines, overridden
        self.values: dict[str, Any] = {}

    def build(self, values: dict[str, Any]) -> RunConfig:
        self.values = values
        return self._build(RunConfig, values, "")

    def _refuse(self, missing: str) -> None:
        raise UserError(f"{self.source}: {missing} is missing; add it to the file or pass --{missing} VALUE")

    def _where(self, key: str) -> str:
        if key in self.overridden:
            return f"--{key}"
        line = f", line {self.lines[key]}" if key in self.lines else ""
        return f"{self.source}{line}: {key}"

    def _build(self, cls: type, values: dict[str, Any], prefix: str) -> Any:
        hints = type_hints(cls)
        self._refuse_unknown(values, hints, prefix)
        arguments = {}
        for name, hint in hints.items():
            key = prefix + name
            nested = dataclass_in(hint)
            items = dataclass_of_items(hint)
            if items is not None and values.get(name) is not None:
                arguments[name] = self._build_items(items, values[name], key)
            elif nested is None:
                if name in values:
                    arguments[name] = self._coerce(values[name], hint, key)
            elif values.get(name) is not None:
                if not isinstance(values[name], dict):
                    raise UserError(f"{self._where(key)}: expected {describe(hint)}, got {show(values[name])}")
                arguments[name] = self._build(nested, values[name], key + ".")
            elif not is_optional(hint):
                # a section whose keys are all commented out is null in YAML
                arguments[name] = self._build(nested, {}, key + ".")
        if any(_is_missing(field, values) for field in dataclasses.fields(cls)):
            raise_all(partial(self._refuse, key) for key in _missing(RunConfig, self.values, ""))
        try:
            return cls(**arguments)
        except ValueError as error:
            # an item of a list does not know its place
            whole, place = re.sub(r"\.\d+\.$", ".", prefix), prefix
            message = str(error).replace(whole, place, 1) if whole != place else str(error)
            raise UserError(self._attribute(message)) from None

    def _build_items(self, cls: type, values: Any, key: str) -> tuple[Any, ...]:
        if not isinstance(values, list) or not all(isinstance(item, dict) for item in values):
            names = ", ".join(type_hints(cls))
            raise UserError(f"{self._where(key)}: expected a list of mappings with {names}; got {show(values)}")
        return tuple(self._build(cls, item, f"{key}.{index}.") for index, item in enumerate(values))

    def _coerce(self, value: Any, hint: Any, key: str) -> Any:
        try:
            return coerce(value, hint)
        except TypeMismatch as mismatch:
            advice = suggestion(value, hint)
            if "string" in mismatch.expected and isinstance(value, (int, float)):
                advice = "; put it in quotes"
            message = f"{self._where(key)}: expected {mismatch.expected}, got {show(value)}{advice}"
            raise UserError(message) from None

    def _refuse_unknown(self, values: dict[Any, Any], hints: dict[str, Any], prefix: str) -> None:
        for name in values:
            if name in hints:
                continue
            known = [key for key, _ in iter_keys()]
            # the same key in another section, else a sibling, else anything
            elsewhere = [key for key in known if key.rsplit(".", 1)[-1] == name]
            sibling = nearest(str(name), hints)
            # in an item of a list, only its own keys are meant
            elsewhere = [] if re.search(r"\.\d+\.$", prefix) else elsewhere
            candidate = elsewhere[0] if elsewhere else prefix + sibling if sibling else nearest(str(name), known)
            advice = f"did you mean {candidate}?" if candidate else f"known here: {', '.join(hints)}"
            if not prefix and candidate in known:
                advice += " (`dpo init --from FILE` converts the files of other trainers)"
            raise UserError(f"{self._where(prefix + str(name))}: unknown key; {advice}")

    def _attribute(self, message: str) -> str:
        """Name the command line rather than the file for a value that came from there."""
        if mentioned := _first_mentioned(self.overridden, message):
            return message.replace(mentioned, f"--{mentioned}", 1)
        mentioned = _first_mentioned((key for key in self.lines if "." in key), message)
        line = f", line {self.lines[mentioned]}" if mentioned else ""
        return f"{self.source}{line}: {message}"


def _first_mentioned(keys: Iterable[str], message: str) -> str | None:
    places = {key: match.start() for key in keys if (match := re.search(rf"(?<![\w.]){re.escape(key)}\b", message))}
    return min(places, key=places.__getitem__, default=None)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_missing(field: dataclasses.Field[Any], values: dict[str, Any]) -> bool:
    """Whether a key must be given and is not: always, or where another one that stands for it is absent."""
    instead = field.metadata.get("needed_without")
    needed = _is_required(field) if instead is None else not values.get(instead)
    return needed and field.name not in values


def _missing(cls: type, values: Any, prefix: str) -> Iterator[str]:
    """Required keys that the file lacks, of all sections that it has or must have."""
    present = values if isinstance(values, dict) else {}
    for field in dataclasses.fields(cls):
        hint = type_hints(cls)[field.name]
        nested, items = dataclass_in(hint), dataclass_of_items(hint)
        if items is not None:
            for index, item in enumerate(present.get(field.name) or ()):
                yield from _missing(items, item, f"{prefix}{field.name}.{index}.")
        elif nested is None:
            if _is_missing(field, present):
                yield prefix + field.name
        elif present.get(field.name) is not None or not is_optional(hint):
            yield from _missing(nested, present.get(field.name), f"{prefix}{field.name}.")


def _all(config: Any, prefix: str) -> list[tuple[str, tuple[Any, Any]]]:
    return [(prefix + field.name, (getattr(config, field.name), None)) for field in dataclasses.fields(config)]


def _differences(config: Any, prefix: str) -> list[tuple[str, tuple[Any, Any]]]:
    found: list[tuple[str, tuple[Any, Any]]] = []
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            # a section that is off by default has no defaults to compare with
            nested = _differences(value, key + ".") if field.default is not None else _all(value, key + ".")
            found += nested
        elif _is_required(field):
            found.append((key, (value, None)))
        elif value != field.default:
            found.append((key, (value, field.default)))
    return found
