"""A shell script that starts a training: its command's options as keys. Nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import UserError
from ..load import FOREIGN_FILE, parse_yaml, read_text

_COMMANDS = (
    ("ms-swift", r"(^|/)swift (rlhf|sft|pt)$|(^|/)megatron rlhf$|swift/cli/rlhf\.py$"),
    ("LLaMA-Factory", r"(^|/)llamafactory-cli train$|(^|/)lmf train$|(^|/)src/train(_bash)?\.py$"),
    ("Axolotl", r"(^|/)axolotl train$|axolotl\.cli\.train$"),
    ("open-instruct", r"open_instruct/(dpo|dpo_tune|dpo_tune_cache|dpo_tune_cache1)\.py$"),
    ("TRL", r"(^|/)trl (dpo|kto)$|trl\.scripts\.(dpo|kto)$|(trl|examples)/scripts/(dpo|kto)\.py$"),
    ("alignment-handbook", r"(^|/)scripts/(run_)?dpo\.py$"),
    ("TRL", r"(^|/)(run_)?(dpo|kto)\.py$"),
)
"""Trainers, and how the words of a command end that starts them; the first that fits counts."""
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.S)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_PROCESSES = ("num_processes", "nproc_per_node", "nproc-per-node")


@dataclass
class Command:
    """A command that starts a trainer: its options by key, and their lines."""

    trainer: str
    keys: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    processes: int | None = None
    program: str = ""


def is_shell(path: str | Path, text: str) -> bool:
    """Whether a file is a shell script, by its ending or because it starts a trainer."""
    if Path(path).suffix in (".sh", ".bash") or text.startswith("#!"):
        return True
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    return not re.match(r"[\w.-]+\s*:(\s|$)", first) and any(_trainer(words) for words, _ in _commands(text))


def read_shell(source: str, text: str) -> Command:
    """The one command of a script that starts a trainer.

    Raises:
        UserError: there is none or more than one, an option depends on what the script does, or a file that the command
            names cannot be read.
    """
    variables: dict[str, str] = {}
    found: list[tuple[Command, int]] = []
    for words, line in _commands(text):
        own = dict(variables)
        while words and (match := _ASSIGNMENT.fullmatch(words[0][0])):
            own[match[1]] = _expanded(match[2], own)
            words = words[1:]
        if words and words[0][0] == "export":
            words = words[1:]
            own |= {m[1]: _expanded(m[2], own) for word, _ in words if (m := _ASSIGNMENT.fullmatch(word))}
            words = []
        if [word for word, _ in words[:1]] == ["for"] and len(words) == 4:
            # a loop over one value
            own[words[1][0]], words = words[3][0], []
        if not words:
            variables = own
            continue
        if started := _trainer(words):
            found.append((_command(source, words, own, *started), line))
    if not found:
        raise UserError(f"{source}: no command starts one of {', '.join(dict(_COMMANDS))}")
    if len(found) > 1:
        lines = ", ".join(str(line) for _, line in found)
        raise UserError(f"{source}: commands in lines {lines} start trainers; leave one")
    return found[0][0]


def _commands(text: str) -> Iterator[tuple[list[tuple[str, int]], int]]:
    """The words of each command, with their lines."""
    words: list[tuple[str, int]] = []
    pending = ""
    for number, physical in enumerate(text.splitlines(), start=1):
        line = pending + physical
        continued = line.rstrip().endswith("\\")
        body = line.rstrip()[:-1] if continued else line
        try:
            # an escaped && is a word for another program
            parts = shlex.split(_without_comment(body).replace("\\&", "+"))
        except ValueError:
            pending = line + "\n"
            continue
        pending = ""
        for part in parts:
            if part in ("&&", ";", "|", "||"):
                if words:
                    yield words, words[0][1]
                words = []
            else:
                words.append((part, number))
        if words and not continued:
            yield words, words[0][1]
            words = []
    if words:
        yield words, words[0][1]


def _without_comment(line: str) -> str:
    """A line up to a # that begins a word outside of quotes, as in a shell."""
    for match in re.finditer(r"(^|(?<=\s))#", line):
        before = line[: match.start()]
        if before.count("'") % 2 == 0 and before.count('"') % 2 == 0:
            return before
    return line


def _trainer(words: list[tuple[str, int]]) -> tuple[str, int] | None:
    """The trainer that a command starts, and where its own options begin."""
    for place in range(len(words)):
        if words[place][0].startswith("-"):
            continue
        last = " ".join(word for word, _ in words[max(0, place - 1) : place + 1])
        for name, pattern in _COMMANDS:
            if re.search(pattern, words[place][0]) or re.search(pattern, last):
                return name, place + 1
    return None


def _command(source: str, words: list[tuple[str, int]], variables: Mapping[str, str], name: str, start: int) -> Command:
    command = Command(name, program=" ".join(word for word, _ in words[max(0, start - 2) : start]))
    launcher = dict(_options([(_expanded(word, variables), line) for word, line in words[: start - 1]])[0])
    options, lines, positional = _parsed([(_expanded(word, variables), line) for word, line in words[start:]])
    counts = [launcher[name] for name in _PROCESSES if name in launcher]
    counts += [variables[name] for name in ("NPROC_PER_NODE",) if name in variables]
    if str(launcher.get("num_nodes")).isdigit() and str(launcher.get("gpus")).isdigit():
        counts = [int(launcher.pop("num_nodes")) * int(launcher.pop("gpus"))]
    nodes = str(launcher.get("nnodes", variables.get("NNODES", "1")))
    if counts and str(counts[0]).isdigit() and nodes.isdigit():
        command.processes = int(counts[0]) * (1 if "num_processes" in launcher else int(nodes))
    elif "CUDA_VISIBLE_DEVICES" in variables and name in ("LLaMA-Factory",):
        command.processes = len(variables["CUDA_VISIBLE_DEVICES"].split(","))
    elif command.processes is None and (given := launcher.get("config_file") or options.get("accelerate_config")):
        command.processes = _of_accelerate(Path(source).parent, str(given))
    files = [value for value in positional if value.endswith((".yaml", ".yml", ".json"))]
    if (given := options.pop("config", None)) is not None and name in ("TRL", "alignment-handbook", "open-instruct"):
        files.append(str(given))
    for file in files:
        at = next((one for one in (Path(file), Path(source).parent / file) if one.exists()), Path(file))
        command.keys |= parse_yaml(at, read_text(at, FOREIGN_FILE), FOREIGN_FILE)[0]
    command.keys |= options
    command.lines = lines
    for key, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and re.search(r"\$[\w{(]|`", one):
                raise UserError(
                    f"{source}, line {lines[key]}: --{key}: {one} is not set in the script; write its value"
                )
    return command


def _of_accelerate(folder: Path, name: str) -> int | None:
    """The processes of a configuration of accelerate, where it can be found."""
    path = next((one for one in (Path(name), folder / name) if one.is_file()), None)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    count = found.get("num_processes") if isinstance(found, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        return variables.get(name, default if default is not None else match[0])

    return _VARIABLE.sub(value, word)


def _options(words: list[tuple[str, int]]) -> tuple[list[tuple[str, Any]], dict[str, int]]:
    options, lines, _ = _parsed(words)
    return list(options.items()), lines


def _parsed(words: list[tuple[str, int]]) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Options, their lines, and what belongs to none."""
    values: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    positional: list[str] = []
    key = None
    for word, line in words:
        if word == "--":
            key = None
        elif match := re.fullmatch(r"(--?)([A-Za-z][\w.-]*)(?:=(.*))?", word, re.S):
            key = match[2].replace("-", "_")
            values[key], lines[key] = ([] if match[3] is None else [match[3]]), line
            if match[3] is not None:
                key = None
        elif key is None and (match := re.fullmatch(r"([A-Za-z]\w*)=(.*)", word, re.S)):
            values[match[1]], lines[match[1]] = [match[2]], line
        elif key is not None:
            values[key].append(word)
        else:
            positional.append(word)
    return {name: _value(name, given) for name, given in values.items()}, lines, positional


def _value(name: str, given: list[str]) -> Any:
    if not given:
        return True
    parsed = [_scalar(one) for one in given]
    return parsed if len(parsed) > 1 else parsed[0]


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) or (value is None and text.lower() not in ("null", "~")):
        return text
    return value
