"""From the flat keys of TRL's DPO and KTO (ScriptArguments, DPOConfig or KTOConfig, ModelConfig) to our own.

Files of other trainers come here, too, once their keys have TRL's names (``convert/``). Defaults count: where the file
is silent and the trainer's default is not ours, the converted file says so in full.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SeveralErrors, UserError
from .fields import nearest, show
from .load import build_config, to_dict
from .losses import UNPAIRED_LOSSES
from .trl_conversion import Conversion, Note
from .trl_evaluation import EvaluationKeys
from .trl_file import TrlFile
from .trl_keys import (
    ADAMW,
    CONVERTED,
    LOSS_OPTIONS,
    NEW_RESULT,
    PRECIOUS,
    RPO_ALPHA,
    SAME_RESULT,
    STOPS,
)
from .trl_processes import ProcessKeys
from .trl_sets import Entry, as_sets

_SAME_OPTIMIZER = {
    "rmsprop": "rmsprop", "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw", "paged_adamw_32bit": "paged_adamw", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_SMOOTHED_IN_TRL = {"exo_pair", "robust", "aot", "aot_unpaired"}
_SEVERAL = ("deepspeed", "fsdp", "accelerate_config", "parallelism_config")
"""Keys of runs on more than one process."""
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab")
_REQUIRED = {"model": "model_name_or_path", "data": "dataset_name"}


def convert_keys(
    trl: TrlFile,
    *,
    trainer: str = "TRL",
    values: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Iterable[Note] = (),
    num_processes: int | None = None,
) -> Conversion:
    """Convert keys that have TRL's names.

    Args:
        trainer: whose file it is, for messages.
        values: sections of the run configuration that are known already; they win.
        notes: what there is to say of keys that ``trl`` does not have.
        num_processes: processes that the run was started with, which multiply its batch; by default the key
            ``num_processes`` of the file, or 1.

    Raises:
        UserError: a value is one that the trainer would refuse, too, or of a kind that must not be lost.
    """
    converter = _Converter(trl, trainer, values or {})
    converter.run(num_processes)
    result = converter.result
    result.notes = [*notes, *(Note(trl.names.get(n.key, n.key), n.effect, n.text) for n in result.notes)]
    # required keys may come from the command line
    complete = {name: dict(section) for name, section in result.values.items()}
    for required_in, key in _REQUIRED.items():
        section = complete.setdefault(required_in, {})
        if section.get(key) is None and not section.get("datasets"):
            section[key] = "missing"
    try:
        validated = to_dict(build_config(complete, trl.source))
    except UserError as error:
        raise UserError(f"{error}{_meant(str(error), trl)}") from None
    for section_name, section in result.values.items():
        # the schema's own types, so that 5e-7 is written as a number
        section.update({key: validated[section_name][key] for key in section if key != "datasets"})
    return result


def _meant(message: str, trl: TrlFile) -> str:
    """What the file calls the key of a message, where that is another name."""
    for key, name in trl.names.items():
        if re.search(rf"\.{re.escape(key.removeprefix('lora_'))}\b", message) and name not in message:
            return f"; it is {trl.where(key).removeprefix(trl.source).lstrip(', :')}"
    return ""


def _entry(one: dict[str, Any], where: str) -> Entry:
    """A set of TRL's ``datasets``, which stand at ``where``."""
    files = one.get("data_files") or ()
    name, split, share = one.get("name"), one.get("split"), one.get("fraction")
    if isinstance(files, dict):
        part, bracket, slice_ = str(split or "train").partition("[")
        if part not in files:
            listed = ", ".join(files)
            raise UserError(f"{where}: data_files of {one['path']} have no split {part!r}; they have {listed}")
        # Files without a name are the train split, whatever they were called.
        files, split = files[part], f"train{bracket}{slice_}"
    files = [files] if isinstance(files, str) else list(files)
    return Entry(
        str(one["path"]),
        None if name is None else str(name),
        "train" if split is None else str(split),
        data_files=tuple(map(str, files)),
        weight=float(share) if isinstance(share, int | float) else None,
    )


def _is_unpaired(keys: Mapping[str, Any]) -> bool:
    """Whether keys are those of KTO, by its losses or by the weights of labels."""
    given = keys.get("loss_type")
    if given is None:
        return "desirable_weight" in keys or "undesirable_weight" in keys
    return any(
        isinstance(name, str) and name in UNPAIRED_LOSSES for name in (given if isinstance(given, list) else [given])
    )


class _Converter(EvaluationKeys, ProcessKeys):
    """Takes keys out of ``trl`` one topic at a time; what is left has no counterpart."""

    def run(self, num_processes: int | None) -> None:
        for section in ("model", "data", "packing", "loss", "optim", "reference", "train"):
            self.result.values[section] = dict(self.given.get(section, {}))
        self.unpaired = _is_unpaired(self.trl.keys)
        self._model()
        self._kernels()
        self._division()
        self._data()
        self._batch(num_processes)
        self._loss()
        self._optim()
        self._reference()
        self._train()
        self._evaluation()
        self._best()
        self._rest()
        for section, values in self.given.items():
            self.result.values[section] |= values
        if self.stops:
            raise self.stops[0] if len(self.stops) == 1 else SeveralErrors(*self.stops)
        self.result.values = {name: values for name, values in self.result.values.items() if values}

    def _data(self) -> None:
        self._mixture()
        self._held_out()
        self._copy("data", "dataset_name", "dataset_config", "dataset_train_split", "max_length")
        if self.trl.take("truncation_mode", "keep_start") != "keep_start":
            self._new("truncation_mode", "only keep_start is supported, which cuts the end of the response")
        for section, key in _REQUIRED.items():
            if not self.result.values[section].get(key) and not self.result.values[section].get("datasets"):
                self.result.notes.append(Note(key, "missing", f"set {section}.{key}, or pass --{section}.{key} VALUE"))

    def _mixture(self) -> None:
        mixture = self.trl.take("datasets")
        if not mixture:
            return
        if not isinstance(mixture, list) or not all(isinstance(d, dict) for d in mixture):
            raise UserError(f"{self.trl.source}: datasets: expected a list of mappings, got {show(mixture)}")
        if any(not one.get("path") or one.get("data_dir") for one in mixture):
            self._stop("datasets", "each set needs a path; a data_dir is read by naming the folder as the path")
            return
        entries = [_entry(one, self.trl.where("datasets")) for one in mixture]
        if len(entries) == 1 and entries[0].is_whole:
            for key, value in (("dataset_name", entries[0].name), ("dataset_config", entries[0].config)):
                if value is not None:
                    self.trl.keys[key] = value
            self.trl.keys["dataset_train_split"] = entries[0].split
            self._same("datasets", "-> data.dataset_name, its configuration and split")
            return
        self.trl.take("dataset_name")
        self.result.values["data"]["datasets"] = as_sets(entries)
        self._same("datasets", "-> data.datasets")
        if any(entry.weight for entry in entries):
            text = "fraction -> weight; TRL ends an epoch before a set comes twice, here it has as many rows as all"
            self._new("datasets", text)

    def _batch(self, num_processes: int | None) -> None:
        per_device = self.trl.whole("per_device_train_batch_size", 8)
        accumulation = self.trl.whole("gradient_accumulation_steps", 1)
        listed = self.trl.take("num_processes")
        processes = num_processes or (self.trl.as_whole("num_processes", listed) if listed is not None else 1)
        train = {**self.result.values["train"], **self.given.get("train", {})}
        if (ranks := train.get("context_parallel", 1)) > 1 and processes > 1:
            if processes % ranks:
                self._stop("num_processes", f"{processes} processes are no multiple of train.context_parallel {ranks}")
            # They have the same rows.
            processes = max(1, processes // ranks)
            self._same("num_processes", f"{ranks} work on the same rows: {processes} times the batch of one")
        packing = self.result.values["packing"]
        if "pairs_per_step" not in packing:
            self._pairs(per_device, accumulation, processes, listed is None and num_processes is None)
        if self.trl.take("accelerate_config") is not None:
            self._same("accelerate_config", "several processes are started with torchrun")
        max_length = self.result.values["data"].get("max_length", 1024)
        if isinstance(max_length, int):
            # A row has one response, and another one's in an evaluation.
            rows = max(2, per_device) if self.unpaired else 2 * per_device
            packing["tokens_per_pack"] = tokens = rows * max_length
            factors = f"{max_length} x {rows}" if self.unpaired else f"2 x {max_length} x {per_device}"
            self._same("max_length", f"{factors} per device, {self.name}'s most -> packing.tokens_per_pack {tokens}")
        self._order(accumulation)

    def _order(self, accumulation: int) -> None:
        packing = self.result.values["packing"]
        sampling = self.trl.take("train_sampling_strategy", "sequential" if self.unpaired else "random")
        loss_type = self.trl.keys.get("loss_type", "kto")
        if self.unpaired and loss_type == "kto" and accumulation > 1:
            text = f"{self.name} estimates KTO's divergence in each batch of its devices, here in the whole step"
            self._new("gradient_accumulation_steps", text)
        if self.unpaired and loss_type == "kto" and sampling != "sequential" and self.name == "TRL":
            self._stop("train_sampling_strategy", f"{show(sampling)} is refused by TRL for loss_type kto")
        elif sampling == "sequential":
            packing["shuffle"] = False
            self._same("train_sampling_strategy", "-> packing.shuffle false")
        elif sampling != "random":
            self._new("train_sampling_strategy", "rows are drawn at random; packs leave no padding to save")

    def _pairs(self, per_device: int, accumulation: int, processes: int, is_guess: bool) -> None:
        self.result.values["packing"]["pairs_per_step"] = pairs = per_device * accumulation * processes
        factors = f"{per_device} x {accumulation} (gradient_accumulation_steps) x {processes} (processes)"
        self._same("per_device_train_batch_size", f"{factors} -> packing.pairs_per_step {pairs}")
        several = [key for key in _SEVERAL if self.trl.keys.get(key)]
        if is_guess and several:
            text = f"not given, so 1, but {' and '.join(several)} mean several; convert with --num-processes N"
            self._new("num_processes", text)
        elif is_guess:
            self._same("num_processes", f"not given, so 1; convert with --num-processes N if {self.name} ran on more")

    def _loss(self) -> None:
        loss = self.result.values["loss"]
        given = self.trl.take("loss_type", "kto" if self.unpaired else "sigmoid")
        types = given if isinstance(given, list) else [given]
        loss["loss_type"] = types[0] if len(types) == 1 else types
        weights = self.trl.keys.get("loss_weights")
        if len(types) > 1:
            self._same("loss_type", f"{' + '.join(map(str, types))}, summed with loss.loss_weights as in TRL")
            if weights is not None:
                loss["loss_weights"] = [self.trl.as_number("loss_weights", w) for w in self.trl.take("loss_weights")]
        elif weights == [1] or weights == [1.0]:
            self.trl.take("loss_weights")
        if self.trl.keys.get("router_aux_loss_coef"):
            self._new(
                "router_aux_loss_coef", f"{self.name} balances experts within micro-batches, here within whole steps"
            )
        if self.trl.keys.get("rpo_alpha") is not None:
            self._new("rpo_alpha", RPO_ALPHA)
        self._copy("loss", *LOSS_OPTIONS)
        smoothing = self.trl.number("label_smoothing", 0.0)
        if smoothing and _SMOOTHED_IN_TRL & set(types):
            loss["label_smoothing"] = smoothing
            ignored = [t for t in types if t not in _SMOOTHED_IN_TRL]
            if "sigmoid" in ignored:
                self._new("label_smoothing", "TRL ignores it for sigmoid; here it makes sigmoid conservative DPO")
        elif smoothing:
            loss["label_smoothing"] = 0.0
            self._same(
                "label_smoothing",
                f"TRL ignores it for {', '.join(map(str, types))}; written as 0, since here {smoothing:g} would mean "
                "conservative DPO for sigmoid",
            )

    def _optim(self) -> None:
        optim = self.result.values["optim"]
        name = str(self.trl.take("optim", "adamw_torch_fused"))
        optim["optimizer"] = _SAME_OPTIMIZER.get(name, "adamw")
        if name not in _SAME_OPTIMIZER and name not in ADAMW:
            self._new("optim", f"{name} is not supported; optim.optimizer adamw takes its place")
        elif name in _SAME_OPTIMIZER:
            self._same("optim", f"{name} -> optim.optimizer {optim['optimizer']}")
        elif name in ADAMW and name not in ("adamw_torch", "adamw_torch_fused"):
            self._same("optim", f"{name} -> optim.optimizer adamw, fused where the device has it")
        optim["learning_rate"] = self.trl.number("learning_rate", 1e-6)
        self._copy("optim", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
        if (norm := self.trl.take("max_grad_norm", 1.0)) != 1.0:
            optim["max_grad_norm"] = 0.0 if norm is None else self.trl.as_number("max_grad_norm", norm)
        if kwargs := self.trl.mapping("lr_scheduler_kwargs"):
            optim["lr_scheduler_kwargs"] = kwargs
        steps = self.trl.number("warmup_steps", 0)
        ratio = self.trl.number("warmup_ratio", 0)
        if ratio and steps:
            self._same("warmup_ratio", "warmup_steps goes before it, as in transformers")
        elif ratio:
            self._same("warmup_ratio", f"-> optim.warmup_steps {ratio:g}: below 1 it is a share of all steps")
        if steps or ratio:
            optim["warmup_steps"] = steps or ratio

    def _reference(self) -> None:
        precomputed = self.trl.take("precompute_ref_log_probs")
        moves = self.trl.flag("sync_ref_model")
        options = {key: self.trl.take(key) for key in ("ref_model_mixup_alpha", "ref_model_sync_steps")}
        given = {"sync_ref_model": moves, **{key: value for key, value in options.items() if value is not None}}
        for key in given if moves else list(given)[1:]:
            self._same(key, f"-> reference.{key}" if moves else "no effect without sync_ref_model")
        if moves:
            self.result.values["reference"] |= {"mode": "live", **given}
            if precomputed:
                self._stop("sync_ref_model", "TRL refuses it beside precompute_ref_log_probs")
            return
        self.result.values["reference"]["mode"] = "auto"
        if precomputed:
            self._same("precompute_ref_log_probs", "-> reference.mode auto: stored by row and reused by later runs")
        else:
            self._same(
                "precompute_ref_log_probs",
                "false: reference.mode auto still computes each row once, before training, with the same numbers; live "
                "would keep a second model in memory",
            )

    def _train(self) -> None:
        train = self.result.values["train"]
        self._copy("train", "output_dir", "seed", "save_total_limit")
        self._copy("train", *(key for key in ("run_name", "project") if self.trl.keys.get(key) is not None))
        if "num_train_epochs" not in self.trl.keys:
            self._same("num_train_epochs", f"not given: {self.name}'s default, 3")
        train["num_train_epochs"] = self.trl.number("num_train_epochs", 3.0)
        max_steps = self.trl.take("max_steps", -1)
        if isinstance(max_steps, int) and max_steps > 0:
            train["max_steps"] = max_steps
        if "gradient_checkpointing" not in self.trl.keys:
            self._same(
                "gradient_checkpointing", f"not given: {self.name}'s default, true; false is faster where memory allows"
            )
        train["gradient_checkpointing"] = self.trl.flag("gradient_checkpointing", True)
        if self.trl.flag("activation_offloading"):
            train["activation_offload"] = True
            self._same("activation_offloading", "-> train.activation_offload")
        trackers = self.trl.take("report_to", "none")
        trackers = trackers if isinstance(trackers, list) else [trackers or "none"]
        trackers += ["tensorboard", "wandb"] if "all" in trackers else []
        train["report_to"] = [name for name in _TRACKERS if name in trackers]
        for name in (t for t in trackers if t not in ("none", "all", *_TRACKERS)):
            self._same("report_to", f"{name}: metrics.jsonl always has TRL's metrics under TRL's names")
        self._cadence("logging", "logging_steps", 10)
        self._cadence("save", "save_steps", 500)

    def _rest(self) -> None:
        known = sorted({*SAME_RESULT, *NEW_RESULT, *CONVERTED, *STOPS})
        for key, value in self.trl.keys.items():
            harmless, reason = NEW_RESULT.get(key, ((), ""))
            if key in SAME_RESULT:
                self._same(key, SAME_RESULT[key])
            elif key in NEW_RESULT and value in harmless:
                self._same(key, f"{json.dumps(value)} is how it is here")
            elif key in NEW_RESULT:
                self._new(key, reason)
            elif key in STOPS:
                if value not in STOPS[key][0]:
                    self._stop(key, STOPS[key][1])
            elif (close := nearest(key, known)) in PRECIOUS:
                self.stops.append(UserError(f"{self.trl.where(key)}: not a key of TRL 1.16; did you mean {close}?"))
            else:
                self._new(key, "not a key of TRL 1.16; dropped" + (f" (did you mean {close}?)" if close else ""))
