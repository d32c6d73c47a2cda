"""The data set of a script, followed through the calls that made it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import Any

from .constants import Script, UnknownValueError, called, unknown

_FILES = ("json", "parquet", "csv", "text")
_SAME = ("with_format", "set_format", "flatten_indices", "remove_columns", "select_columns", "cast_column")
"""Methods that leave the rows as they are."""
_UNPAIRED = ("unpair_preference_dataset", "maybe_unpair_preference_dataset")
"""Functions of TRL that make rows out of pairs, as the losses of unpaired rows do here."""


@dataclass(frozen=True)
class Rows:
    """Rows of one data set, in the terms of ``data``."""

    name: str
    config: str | None = None
    split: str | None = None
    """None: all splits."""
    files: tuple[tuple[str, str], ...] = ()
    """Splits that are files of their own."""
    columns: tuple[tuple[str, str], ...] = ()
    """Renamed columns: what a part was called."""
    held_out: float | None = None
    """Share of the rows that is split off for evaluation."""
    shuffled: bool = False
    """Whether their order is a random one, so that the first of them are any rows."""
    changes: tuple[tuple[int, str], ...] = ()
    """Lines, and what happens there that is not done here."""

    def source(self) -> tuple[str, str]:
        """Data set and split."""
        files = dict(self.files)
        split = self.split or "train"
        return (files[split], "train") if split in files else (self.name, split)

    def as_training(self) -> dict[str, Any]:
        """As training data."""
        name, split = self.source()
        if self.held_out is not None and split == "test":
            split = "train"
        found: dict[str, Any] = {"dataset_name": name, "dataset_config": self.config, "dataset_train_split": split}
        found["columns"] = dict(self.columns)
        found["eval_fraction"] = self.held_out
        return {key: value for key, value in found.items() if value and value != "train"}

    def as_evaluation(self, training: dict[str, Any], line: int) -> dict[str, Any]:
        """As evaluation data, beside the training data.

        Raises:
            UnknownValueError: it cannot be said there.
        """
        if self.held_out is not None:
            return {} if training.get("eval_fraction") else {"eval_fraction": self.held_out}
        if self.split is None and not self.files:
            raise UnknownValueError(f"all splits of {self.name} are meant; name one, such as ['test']", line)
        if self.config != training.get("dataset_config"):
            text = f"{self.name} has the configuration {self.config}, and training data has another"
            raise UnknownValueError(f"{text}, which cannot be said; write the rows to a file", line)
        name, split = self.source()
        return {"eval_dataset_name": name, "eval_dataset_split": split}


def evaluation_of(script: Script, node: ast.expr, training: dict[str, Any]) -> tuple[dict[str, Any], list[Rows]]:
    """The evaluation data that an expression stands for, one set or several by name, and its rows.

    Raises:
        UnknownValueError: it depends on what the script does, or cannot be said.
    """
    found = script.node(node)
    if not isinstance(found, ast.Dict) and not (isinstance(found, ast.Call) and called(found) == "dict"):
        rows = rows_of(script, node)
        return rows.as_evaluation(training, node.lineno), [rows]
    sets = {name: rows_of(script, value) for name, value in script.items(found)}
    parts = {name: rows.as_evaluation(training, node.lineno) for name, rows in sets.items()}
    if any("eval_dataset_name" not in part for part in parts.values()):
        raise UnknownValueError("one of several sets is split off the training data; write it to a file", node.lineno)
    keys = ("eval_dataset_name", "eval_dataset_split")
    return {key: {name: part[key] for name, part in parts.items()} for key in keys}, list(sets.values())


def rows_of(script: Script, node: ast.expr) -> Rows:
    """The rows that an expression stands for.

    Raises:
        UnknownValueError: it depends on what the script does.
    """
    node = script.node(node)
    if isinstance(node, ast.Subscript):
        rows = rows_of(script, node.value)
        part = script.value(node.slice)
        if not isinstance(part, str):
            raise unknown(node)
        return rows if rows.held_out is not None else replace(rows, split=part)
    if not isinstance(node, ast.Call):
        raise unknown(node)
    name = called(node)
    if name == "load_dataset":
        return _loaded(script, node)
    if name in ("load_from_disk", "from_json", "from_parquet", "from_csv"):
        return Rows(str(script.value(node.args[0])), split="train" if name != "load_from_disk" else None)
    if name in _UNPAIRED and node.args:
        return rows_of(script, node.args[0])
    if name == "concatenate_datasets" or name == "interleave_datasets":
        raise UnknownValueError(f"{name} joins several data sets; write their rows to one file", node.lineno)
    if isinstance(node.func, ast.Attribute):
        return _derived(script, node, rows_of(script, node.func.value))
    raise unknown(node)


def _loaded(script: Script, node: ast.Call) -> Rows:
    given = dict(script.keywords(node, ("path", "name")))
    path = str(script.value(given.pop("path")))
    config = script.value(given.pop("name")) if "name" in given else None
    split = script.value(given.pop("split")) if "split" in given else None
    files = script.value(given.pop("data_files")) if "data_files" in given else None
    told = ("num_proc", "cache_dir", "token", "use_auth_token", "trust_remote_code", "streaming", "verification_mode")
    lost = [key for key in given if key not in told]
    if "data_dir" in lost:
        raise UnknownValueError("data_dir is not read; name the folder or its files", node.lineno)
    changes = tuple((given[key].lineno, f"{key} is not read") for key in lost)
    if isinstance(split, list):
        raise UnknownValueError("several splits are asked for at once", node.lineno)
    if isinstance(files, list) and len(files) > 1:
        raise UnknownValueError(f"{len(files)} files are not read as one; join them or give a pattern", node.lineno)
    if files is not None and path not in _FILES:
        raise UnknownValueError(f"data_files inside {path} are not read; give the file itself", node.lineno)
    if isinstance(files, dict):
        by_split = tuple((str(key), str(one[0] if isinstance(one, list) else one)) for key, one in files.items())
        return Rows(path, config, split, by_split, changes=changes)
    if files is not None:
        name = str(files[0] if isinstance(files, list) else files)
        return Rows(name, config, split, changes=changes)
    return Rows(path, config, split, changes=changes)


def _derived(script: Script, node: ast.Call, rows: Rows) -> Rows:
    """What a method of a data set makes of its rows."""
    name = called(node)
    given = dict(script.keywords(node, ("first", "second")))
    if name in _SAME:
        return rows
    if name == "shuffle":
        return replace(rows, shuffled=True)
    if name in ("select", "take"):
        count = _count(script, node, given)
        if rows.shuffled:
            text = f".{name} takes {count} rows of a random order there, here the first {count} of the data set"
            rows = replace(rows, changes=(*rows.changes, (node.lineno, text)))
        split = rows.split or "train"
        if "[" in split:
            raise unknown(node)
        return replace(rows, split=f"{split}[:{count}]")
    if name == "rename_column":
        old, new = (str(script.value(value)) for value in list(given.values())[:2])
        return replace(rows, columns=(*rows.columns, (new, old)))
    if name == "rename_columns":
        mapping = script.value(next(iter(given.values())))
        return replace(rows, columns=(*rows.columns, *((new, old) for old, new in mapping.items())))
    if name == "train_test_split":
        size = script.value(given.get("test_size", given.get("first", ast.Constant(0.25, lineno=node.lineno))))
        if not isinstance(size, float) or not 0 < size < 1:
            raise UnknownValueError("test_size is no share below 1; write the rows to two files", node.lineno)
        return replace(rows, held_out=size)
    if name in ("map", "filter"):
        text = f".{name}({ast.unparse(node.args[0])[:40] if node.args else '...'}) is not run; write the rows that it "
        advice = "gives to a file (`.to_json`) and set data.dataset_name, unless the rows are right as they are"
        return replace(rows, changes=(*rows.changes, (node.lineno, text + advice)))
    raise unknown(node)


def _count(script: Script, node: ast.Call, given: dict[str, ast.expr]) -> int:
    first = script.node(next(iter(given.values()))) if given else node
    if called(node) == "take":
        return int(script.value(first))
    if isinstance(first, ast.Call) and called(first) == "range" and len(first.args) == 1:
        return int(script.value(first.args[0]))
    raise unknown(node)
