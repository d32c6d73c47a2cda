"""A Python script that trains with TRL's ``DPOTrainer`` or ``KTOTrainer``: its settings as TRL's keys. Never run."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError, raise_all
from ..trl_conversion import Effect, Note
from ..trl_keys import SAME_RESULT
from .constants import Script, UnknownValueError, called, unknown
from .script_data import evaluation_of, rows_of
from .script_keys import (
    CHANGES,
    CONFIG_LEFT,
    LORA,
    LORA_DEFAULTS,
    LORA_LEFT,
    MODEL,
    MODEL_LEFT,
    NAMES,
    PLAIN_ARGUMENTS,
    QUANTIZED,
)

_TRAINERS = ("DPOTrainer", "UnslothDPOTrainer", "KTOTrainer", "UnslothKTOTrainer")
_CONFIGS = ("DPOConfig", "KTOConfig", "TrainingArguments")
_POSITIONAL = ("model", "ref_model", "args")


@dataclass
class ScriptSettings:
    """TRL's keys of a script, their lines, and what there is to say."""

    keys: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


def is_script(path: str | Path, text: str) -> bool:
    """Whether a file is a Python script, by its ending or by its text."""
    if Path(path).suffix == ".py":
        return True
    if not any(f"{name}(" in text for name in (*_TRAINERS, *_CONFIGS)):
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def read_script(source: str, text: str) -> ScriptSettings:
    """The settings of a script.

    Raises:
        UserError: it is no Python, trains with neither trainer, or a setting depends on what the script does.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{source}, line {line}: no Python that can be read: {getattr(error, 'msg', error)}") from None
    return _Reader(source, Script(tree)).read()


class _Reader:
    def __init__(self, source: str, script: Script) -> None:
        self.source, self.script = source, script
        self.found = ScriptSettings()
        self.errors: list[UserError] = []

    def read(self) -> ScriptSettings:
        trainer = self._one(_TRAINERS)
        if trainer is None and self._one(_CONFIGS) is None:
            others = self.script.calls("CPOTrainer", "ORPOTrainer", "SFTTrainer", "GRPOTrainer")
            what = (
                f"{called(others[0])} in line {others[0].lineno} is not converted"
                if others
                else "no DPOTrainer(...) or KTOTrainer(...) is in it"
            )
            raise UserError(f"{self.source}: {what}; scripts that call trl.DPOTrainer or trl.KTOTrainer are")
        given = dict(self.script.keywords(trainer, _POSITIONAL)) if trainer else {}
        self._config(given.pop("args", None))
        if (start := trainer or self._one(_CONFIGS)) is not None and "KTO" in called(start):
            self.found.keys.setdefault("loss_type", "kto")
        self._model(given.pop("model", None))
        self._reference(given.pop("ref_model", None))
        if (peft := given.pop("peft_config", None)) is not None:
            self._try(lambda: self._lora(peft), "peft_config")
        self._data(given)
        self._tokenizer([given.pop(name, None) for name in ("processing_class", "tokenizer")])
        for call in self.script.calls("add_callback"):
            self._callbacks(call.args)
        self._changes_of_the_model()
        for name, node in given.items():
            self._argument(name, node)
        for cls in (n for n in ast.walk(self.script.tree) if isinstance(n, ast.ClassDef)):
            if any(called(base) in _TRAINERS for base in cls.bases):
                self._say(cls.name, "new", "a trainer of its own; what it changes is not read", cls.lineno)
        raise_all([_raiser(error) for error in self.errors])
        return self.found

    def _one(self, names: tuple[str, ...]) -> ast.Call | None:
        calls = self.script.calls(*names)
        if len(calls) > 1:
            lines = ", ".join(str(call.lineno) for call in calls)
            raise UserError(f"{self.source}: {called(calls[0])} is called in lines {lines}; leave one of them")
        return calls[0] if calls else None

    def _try(self, read: Any, name: str) -> None:
        """Read a setting; one that cannot be resolved is an error by its name and line."""
        try:
            read()
        except UnknownValueError as error:
            self.errors.append(
                UserError(f"{self.source}, line {error.line}: {name}: {error}; write its value there and convert again")
            )

    def _say(self, key: str, effect: Effect, text: str, line: int) -> None:
        self.found.notes.append(Note(key, effect, f"line {line}: {text}"))

    def _set(self, key: str, node: ast.expr) -> None:
        """Set a TRL key to the value of an expression."""
        self.found.lines[key] = node.lineno
        if key in SAME_RESULT or key in NAMES:
            try:
                self.found.keys[key] = self.script.value(node)
            except UnknownValueError:
                if key in SAME_RESULT:
                    self.found.keys[key] = ast.unparse(node)
                else:
                    self._say(key, "told", f"{ast.unparse(node)[:60]} is not a constant; set train.{key}", node.lineno)
            return

        def read() -> None:
            self.found.keys[key] = self.script.value(node)

        self._try(read, key)

    def _config(self, node: ast.expr | None) -> None:
        call: ast.expr | None = self._one(_CONFIGS)
        if node is not None:
            try:
                call = self.script.node(node)
            except UnknownValueError as error:
                raise UserError(f"{self.source}, line {error.line}: args: {error}; {_NO_PARSER}") from None
        if call is None:
            return
        if not isinstance(call, ast.Call) or called(call) not in _CONFIGS:
            text = ast.unparse(call)[:60]
            text += " is not DPOConfig(...) or KTOConfig(...)"
            raise UserError(f"{self.source}, line {call.lineno}: args: {text}; {_NO_PARSER}")
        arguments: list[tuple[str, ast.expr]] = []
        self._try(lambda: arguments.extend(self.script.keywords(call, ("output_dir",))), called(call))
        for key, value in arguments:
            self._set(key, value)
        names = {node.id} if isinstance(node, ast.Name) else set()
        for one in self.script.attributes:
            if one.of not in names and not one.of.endswith(".args"):
                continue
            if one.condition is not None:
                text = f"{one.of}.{one.name} is set under the condition of line {one.condition}"
                self.errors.append(UserError(f"{self.source}, line {one.line}: {text}; set it without one"))
            else:
                self._set(one.name, one.value)
        if called(call) == "TrainingArguments":
            for key, default in PLAIN_ARGUMENTS.items():
                if key not in self.found.lines:
                    self.found.keys[key] = default
                    self._say(key, "told", f"not given: the default of TrainingArguments, {default}", call.lineno)

    def _model(self, node: ast.expr | None) -> None:
        if node is not None:
            self._try(lambda: self._model_at(node), "model")

    def _model_at(self, node: ast.expr) -> None:
        node = self.script.node(node)
        if not isinstance(node, ast.Call):
            self._set("model_name_or_path", node)
            return
        name = called(node)
        if name == "from_pretrained" and "Peft" in ast.unparse(node.func):
            given = dict(self.script.keywords(node, ("model", "adapter")))
            path = given.get("adapter", given.get("model_id"))
            self._model_at(given["model"])
            self.found.values["model"] = {"adapter_name_or_path": self.script.value(path) if path else None}
            self._say(
                "model", "told", f"-> model.adapter_name_or_path {ast.unparse(path) if path else ''}", node.lineno
            )
        elif name == "from_pretrained":
            self._loaded(node)
        elif name == "get_peft_model":
            given = dict(self.script.keywords(node, ("model", "peft_config")))
            self._model_at(given.pop("model"))
            if (peft := given.pop("peft_config", None)) is not None:
                self._lora(peft)
            else:
                self._adapter(given.items())
        elif name in ("prepare_model_for_kbit_training", "to", "cuda"):
            inner = node.args[0] if name.startswith("prepare") else node.func.value  # type: ignore[attr-defined]
            self._model_at(inner)
        else:
            raise unknown(node)

    def _loaded(self, node: ast.Call) -> None:
        """``from_pretrained`` of a model."""
        for key, value in self.script.keywords(node, ("model_name_or_path",)):
            if key in ("pretrained_model_name_or_path", "model_name", "model_name_or_path"):
                self._set("model_name_or_path", value)
            elif key == "quantization_config":
                self._quantized(value)
            elif key in MODEL:
                is_none = isinstance(value, ast.Constant) and value.value is None
                if not is_none:
                    self._set(MODEL[key], value)
            elif key in MODEL_LEFT:
                self._say(key, "told", "how the model is loaded is decided here", value.lineno)
            else:
                self._say(key, "new", f"{ast.unparse(value)[:60]} changes the model; not supported", value.lineno)

    def _changes_of_the_model(self) -> None:
        """What a script does to a model and its tokenizer beside loading them."""
        for one in self.script.attributes:
            if one.name == "router_aux_loss_coef" and one.of.endswith(".config"):
                self._set(one.name, one.value)
            elif one.of.endswith(".config") and one.name not in CONFIG_LEFT:
                self._say(f"{one.of}.{one.name}", "new", "changes the model; not supported", one.line)
            elif one.name == "requires_grad":
                self._say("requires_grad", "new", f"{one.of}: parts of a model are not frozen alone", one.line)
        for call in self.script.calls(*CHANGES):
            self._say(called(call), "new", "is not run; save a model and a tokenizer with what it does", call.lineno)

    def _call(self, node: ast.expr, name: str) -> ast.Call | None:
        """The call of a class that an expression stands for; None where it is None.

        Raises:
            UnknownValueError: it is something else.
        """
        call = self.script.node(node)
        if isinstance(call, ast.Constant) and call.value is None:
            return None
        if not isinstance(call, ast.Call) or called(call) != name:
            raise unknown(call)
        return call

    def _quantized(self, node: ast.expr) -> None:
        call = self._call(node, "BitsAndBytesConfig")
        for key, value in self.script.keywords(call) if call is not None else ():
            if key in QUANTIZED:
                self._set(QUANTIZED[key], value)
            else:
                self._say(key, "told", "4-bit weights compute in model.dtype", value.lineno)

    def _reference(self, node: ast.expr | None) -> None:
        if node is None:
            return
        before = dict(self.found.keys), dict(self.found.values), list(self.found.notes), dict(self.found.lines)

        def read() -> None:
            found = self.script.node(node)
            if isinstance(found, ast.Constant) and found.value is None:
                return
            self._model_at(found)
            name = self.found.keys.get("model_name_or_path")
            self.found.keys, self.found.values, self.found.notes, self.found.lines = before
            if name != self.found.keys.get("model_name_or_path"):
                self.found.values.setdefault("reference", {})["model_name_or_path"] = name
                self._say("ref_model", "told", f"-> reference.model_name_or_path {name}", node.lineno)

        self._try(read, "ref_model")

    def _lora(self, node: ast.expr) -> None:
        call = self._call(node, "LoraConfig")
        if call is not None:
            self._adapter(self.script.keywords(call, ("task_type",)))

    def _adapter(self, arguments: Any) -> None:
        self.found.keys["use_peft"] = True
        for key, value in arguments:
            if key in LORA:
                self._set(LORA[key], value)
            elif key not in LORA_LEFT or (
                (harmless := LORA_LEFT[key]) is not None and self.script.value(value) not in harmless
            ):
                text = f"{key}={ast.unparse(value)} is not supported; remove it to convert without it"
                self.errors.append(UserError(f"{self.source}, line {value.lineno}: LoraConfig: {text}"))
        for key, default in LORA_DEFAULTS.items():
            self.found.keys.setdefault(key, default)

    def _data(self, given: dict[str, ast.expr]) -> None:
        data: dict[str, Any] = {}
        train, evaluation = given.pop("train_dataset", None), given.pop("eval_dataset", None)
        if train is not None:
            self._try(lambda: data.update(self._training(train)), "train_dataset")
        # Rows that are split off are not trained on, whether they are evaluated or not.
        split_off = {"eval_fraction"} & set(data)
        if evaluation is not None and not (isinstance(evaluation, ast.Constant) and evaluation.value is None):
            self._try(lambda: data.update(self._evaluated(evaluation, data)), "eval_dataset")
        if data.get("eval_fraction"):
            text = "other rows are held out, by the content of their prompts"
            self.found.notes.append(
                Note("train_test_split", "new", f"-> data.eval_fraction {data['eval_fraction']:g}: {text}")
            )
        self.found.values["data"] = data
        if "eval_dataset_name" in data or "eval_fraction" in data:
            self.found.keys.setdefault("eval_strategy", "no")
            if self.found.keys["eval_strategy"] in ("no", False):
                for key in [key for key in data if key.startswith("eval_") and key not in split_off]:
                    del data[key]
                text = "evaluated once, after training" if split_off else "not evaluated"
                self._say(
                    "eval_dataset", "told", f"{text}, without eval_strategy", evaluation.lineno if evaluation else 1
                )

    def _training(self, node: ast.expr) -> dict[str, Any]:
        rows = rows_of(self.script, node)
        for line, text in rows.changes:
            self._say("train_dataset", "new", text, line)
        return rows.as_training()

    def _evaluated(self, node: ast.expr, training: dict[str, Any]) -> dict[str, Any]:
        found, sets = evaluation_of(self.script, node, training)
        for line, text in dict.fromkeys(change for rows in sets for change in rows.changes):
            self._say("eval_dataset", "new", text, line)
        return found

    def _tokenizer(self, nodes: list[ast.expr | None]) -> None:
        for node in (n for n in nodes if n is not None):
            try:
                call = self.script.node(node)
                first = (
                    next(iter(dict(self.script.keywords(call, ("name",))).values()))
                    if isinstance(call, ast.Call)
                    else call
                )
                name = self.script.value(first) if called(call) == "from_pretrained" else None
            except UnknownValueError:
                name = None
            if name is None:
                self._say("processing_class", "told", "taken to be the model's own tokenizer", node.lineno)
            elif name != self.found.keys.get("model_name_or_path"):
                self.found.keys["tokenizer_name_or_path"] = name
        for one in self.script.attributes:
            if one.name == "chat_template":
                text = "is not read; write the template to a file for data.chat_template"
                self._say("chat_template", "new", f"{ast.unparse(one.value)[:40]} {text}", one.line)

    def _argument(self, name: str, node: ast.expr) -> None:
        """Further arguments of the trainer; until TRL 0.12 keys of DPOConfig were among them."""
        if isinstance(node, ast.Constant) and node.value is None:
            return
        if name == "callbacks" and isinstance(listed := self._followed(node), ast.List | ast.Tuple):
            self._callbacks(listed.elts)
        elif name in ("callbacks", "optimizers", "data_collator", "compute_metrics", "model_init", "formatting_func",
                    "preprocess_logits_for_metrics", "quantization_config"):  # fmt: skip
            self._say(name, "new", f"{ast.unparse(node)[:60]} is not read", node.lineno)
        else:
            self._set(name, node)

    def _followed(self, node: ast.expr) -> ast.expr:
        """What a name stands for, where that can be told."""
        try:
            return self.script.node(node)
        except UnknownValueError:
            return node

    def _callbacks(self, nodes: list[ast.expr]) -> None:
        for node in nodes:
            call = self._followed(node)
            if not isinstance(call, ast.Call) or called(call) != "EarlyStoppingCallback":
                self._say("callbacks", "new", f"{ast.unparse(node)[:60]} is not read", node.lineno)
            else:
                self._try(partial(self._stopping, call), "EarlyStoppingCallback")

    def _stopping(self, call: ast.Call) -> None:
        given = {key: self.script.value(value) for key, value in self.script.keywords(call, _STOPPING)}
        values = {"early_stopping_patience": 1, **{key: given[key] for key in _STOPPING if key in given}}
        self.found.values.setdefault("train", {}).update(values)
        words = ", ".join(f"train.{key} {value}" for key, value in values.items())
        self._say("EarlyStoppingCallback", "told", f"-> {words}", call.lineno)


_STOPPING = ("early_stopping_patience", "early_stopping_threshold")
_NO_PARSER = (
    "where options come from a command line or a file, convert that: `dpo init --from FILE` reads YAML and shell "
    "commands, too"
)


def _raiser(error: UserError) -> Any:
    def fail() -> None:
        raise error

    return fail
