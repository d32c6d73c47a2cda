"""Which trainer a file belongs to, by what is in it, and its conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..from_trl import convert_keys
from ..load import FOREIGN_FILE, parse_yaml, read_text
from ..trl_conversion import Conversion
from ..trl_file import TrlFile
from .axolotl import AXOLOTL
from .handbook import HANDBOOK
from .llama_factory import LLAMA_FACTORY
from .ms_swift import MS_SWIFT
from .open_instruct import OPEN_INSTRUCT
from .reading import Trainer, convert_with
from .script import is_script, read_script
from .shell import is_shell, read_shell
from .transformers_keys import TRL_KEYS

TRAINERS = (AXOLOTL, LLAMA_FACTORY, MS_SWIFT, HANDBOOK, OPEN_INSTRUCT)
TRL_MARKS = frozenset({"model_name_or_path", "dataset_name", "per_device_train_batch_size", "use_peft", "loss_type"})
"""Keys that most files of TRL have, and few others."""
_NAMES = ", ".join(["TRL", *(trainer.name for trainer in TRAINERS)])


def convert_file(path: str | Path, *, num_processes: int | None = None) -> Conversion:
    """Convert the file ``path`` of another trainer, which is recognised by what is in it.

    Args:
        num_processes: processes that the run was started with, which multiply its batch; by default what the file
            says, or 1.

    Raises:
        UserError: the file cannot be read, belongs to no trainer that is known or to several, has a value that its
            trainer would refuse, or one whose meaning would be lost.
    """
    text = read_text(path, FOREIGN_FILE)
    source = str(path)
    if is_script(path, text):
        found = read_script(source, text)
        trl = TrlFile(source, found.keys, found.lines)
        return convert_keys(trl, values=found.values, notes=found.notes, num_processes=num_processes)
    if is_shell(path, text):
        return _convert_command(source, text, num_processes)
    keys, lines = parse_yaml(path, text, FOREIGN_FILE)
    keys = {str(key): value for key, value in keys.items()}
    if isinstance(keys.get("model"), dict) or isinstance(keys.get("data"), dict):
        raise UserError(f"{path}: has the sections of a run configuration already; nothing to convert")
    return _convert_with(recognise(source, keys), TrlFile(source, keys, lines), num_processes)


def _convert_command(source: str, text: str, num_processes: int | None) -> Conversion:
    command = read_shell(source, text)
    keys = {str(key): value for key, value in command.keys.items()}
    for key in [key for key, value in keys.items() if value is True and key.startswith("no_")]:
        # how a command line switches off what is on
        if key not in TRL_KEYS and key.removeprefix("no_") in TRL_KEYS:
            keys[key.removeprefix("no_")] = not keys.pop(key)
    trainer = next((trainer for trainer in TRAINERS if trainer.name == command.trainer), None)
    if "megatron" in command.program:
        keys.setdefault("tuner_type", "full")
    if command.trainer == "TRL" and re.search(r"kto(\.py)?$", command.program):
        keys.setdefault("loss_type", "kto")
    if command.trainer in ("TRL", HANDBOOK.name):
        # scripts of one name
        trainer = recognise(source, keys)
    return _convert_with(trainer, TrlFile(source, keys, command.lines), num_processes or command.processes)


def _convert_with(trainer: Trainer | None, file: TrlFile, num_processes: int | None) -> Conversion:
    if trainer is None:
        return convert_keys(file, num_processes=num_processes)
    return convert_with(trainer, file, num_processes)


def recognise(source: str, keys: Mapping[str, Any]) -> Trainer | None:
    """The trainer that flat keys belong to; None is TRL.

    Raises:
        UserError: no trainer has such keys, or several do.
    """
    marked = {trainer: sorted(trainer.marks & keys.keys()) for trainer in TRAINERS}
    marked = {trainer: marks for trainer, marks in marked.items() if marks}
    if not marked and "dataset_mixer" in keys:
        return HANDBOOK
    if not marked:
        if not TRL_KEYS & keys.keys():
            raise UserError(f"{source}: not a file of {_NAMES}: none of its keys ({', '.join(keys)}) is known")
        return None
    trainer = next(iter(marked))
    others = {other.name: marks for other, marks in marked.items() if other is not trainer}
    if foreign := sorted(key for key in TRL_MARKS & keys.keys() if key not in {*trainer.rules, *trainer.same_names}):
        others["TRL"] = foreign
    if others:
        found = [f"{name} ({', '.join(marks)})" for name, marks in {trainer.name: marked[trainer], **others}.items()]
        raise UserError(f"{source}: has keys of {' and of '.join(found)}; leave those of one trainer in it")
    return trainer
