"""From the keys of TRL's DPO (ScriptArguments, DPOConfig and ModelConfig, flat) to a run configuration.

Files of other trainers come here, too, once their keys have TRL's names (``convert/``). Defaults count: where the file
is silent and the trainer's default is not ours, the converted file says so in full.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SeveralErrors, UserError
from .fields import nearest, show
from .load import build_config, to_dict
from .trl_conversion import Conversion, Note
from .trl_file import TrlFile
from .trl_keys import (
    ADAMW,
    COMPARED,
    CONVERTED,
    LOSS_OPTIONS,
    NEW_RESULT,
    PRECIOUS,
    RPO_ALPHA,
    SAME_RESULT,
    STOPS,
)

_SAME_OPTIMIZER = {
    "rmsprop": "rmsprop", "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw", "paged_adamw_32bit": "paged_adamw", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_ATTENTION = {"flash_attention_2": "flash", "sdpa": "sdpa"}
_SMOOTHED_IN_TRL = {"exo_pair", "robust", "aot", "aot_unpaired"}
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
        if complete.setdefault(required_in, {}).setdefault(key, None) is None:
            complete[required_in][key] = "missing"
    validated = to_dict(build_config(complete, trl.source))
    for section_name, section in result.values.items():
        # the schema's own types, so that 5e-7 is written as a number
        section.update({key: validated[section_name][key] for key in section})
    return result


class _Converter:
    """Takes keys out of ``trl`` one topic at a time; what is left has no counterpart."""

    def __init__(self, trl: TrlFile, trainer: str, values: Mapping[str, Mapping[str, Any]]) -> None:
        self.trl, self.name, self.given = trl, trainer, values
        self.result = Conversion(trl.source, trainer=trainer)
        self.stops: list[UserError] = []

    def run(self, num_processes: int | None) -> None:
        for section in ("model", "data", "packing", "loss", "optim", "reference", "train"):
            self.result.values[section] = dict(self.given.get(section, {}))
        self._model()
        self._data()
        self._batch(num_processes)
        self._loss()
        self._optim()
        self._reference()
        self._train()
        self._evaluation()
        self._rest()
        for section, values in self.given.items():
            self.result.values[section] |= values
        if self.stops:
            raise self.stops[0] if len(self.stops) == 1 else SeveralErrors(*self.stops)
        self.result.values = {name: values for name, values in self.result.values.items() if values}

    def _model(self) -> None:
        kwargs = self.trl.mapping("model_init_kwargs")
        for old, new in (("revision", "model_revision"), ("torch_dtype", "dtype")):
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
        for key in ("model_revision", "dtype", "attn_implementation", "trust_remote_code"):
            if key in kwargs:
                self.trl.keys.setdefault(key, kwargs.pop(key))
        for key in kwargs:
            self._same(f"model_init_kwargs.{key}", "how the model is loaded is decided here")
        self._copy("model", "model_name_or_path", "tokenizer_name_or_path", "trust_remote_code")
        revision = self.trl.take("model_revision", "main")
        if revision != "main":
            self._put("model", "revision", str(revision), "model_revision")
        self._precision()
        attention = self.trl.take("attn_implementation")
        if attention in _ATTENTION:
            self._put("model", "attention", _ATTENTION[attention], "attn_implementation")
        elif attention is not None:
            self._same("attn_implementation", f"{attention} is not one of ours; model.attention auto takes the fastest")
        self._lora()

    def _precision(self) -> None:
        fp16, bf16 = self.trl.flag("fp16"), self.trl.take("bf16")
        held = self.trl.take("dtype", self.trl.take("torch_dtype", "float32"))
        if fp16:
            self._new("fp16", "float16 is not supported; model.dtype bfloat16 has its speed without loss scaling")
        computed = "bfloat16" if fp16 or bf16 in (None, True) or held in ("bfloat16", "float16") else "float32"
        if bf16 is not None:
            self._same("bf16", f"-> model.dtype {computed}")
        self.result.values["model"]["dtype"] = computed
        if held in ("bfloat16", "float16", "auto") and not self.trl.keys.get("use_peft"):
            self._new(
                "dtype",
                f"{self.name} trains the weights in {held}, which rounds small updates away; here trained weights are "
                f"float32, which takes more memory, and compute in model.dtype {computed}; they are stored as float32, "
                "too, unless train.save_dtype is bfloat16",
            )
        elif held == "float16":
            self._new("dtype", f"float16 -> model.dtype {computed}, which the frozen base is held in, too")
        elif held != "float32":
            self._same("dtype", f"{held} -> model.dtype {computed}, which the frozen base is held in, too")

    def _lora(self) -> None:
        defaults = {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": None}
        variants = {name: self.trl.flag(name) for name in ("use_rslora", "use_dora")}
        given = [name for name in defaults if f"lora_{name}" in self.trl.keys]
        values = {name: self.trl.take(f"lora_{name}", default) for name, default in defaults.items()}
        if copies := self.trl.take("lora_modules_to_save"):
            given.append("modules_to_save")
            values["modules_to_save"] = [copies] if isinstance(copies, str) else copies
        if not self.trl.flag("use_peft"):
            for key in (*(f"lora_{name}" for name in given), *(name for name, used in variants.items() if used)):
                self._same(key, "no effect without use_peft")
            self._quantization(trains_adapter=False)
            return
        if values["target_modules"] == ["all-linear"]:
            values["target_modules"] = "all-linear"
        values |= {name: True for name, used in variants.items() if used}
        self.result.values["model"]["lora"] = values
        self._same("use_peft", f"-> model.lora; the adapter switched off is the reference, as in {self.name}")
        for name in given:
            self._same(f"lora_{name}", f"-> model.lora.{name}")
        if "target_modules" not in given:
            self._same("lora_target_modules", f"not given: null, which is peft's own choice, as in {self.name}")
        if "dropout" not in given:
            self._same("lora_dropout", f"not given: {self.name}'s default, 0.05")
        self._quantization(trains_adapter=True)

    def _quantization(self, *, trains_adapter: bool) -> None:
        four = self.trl.flag("load_in_4bit")
        kind, nested = self.trl.take("bnb_4bit_quant_type", "nf4"), self.trl.flag("use_bnb_nested_quant")
        self.trl.take("bnb_4bit_quant_storage")
        if not four:
            return
        if not trains_adapter:
            self._new(
                "load_in_4bit", "a quantised model can only be trained with adapters; all weights are trained in full"
            )
            return
        self._put("model", "quantization", str(kind), "load_in_4bit")
        if not nested:
            self._new("use_bnb_nested_quant", "false: here the scales of 4-bit weights are always quantised, too")

    def _data(self) -> None:
        self._mixture()
        self._copy("data", "dataset_name", "dataset_config", "dataset_train_split", "max_length")
        if self.trl.take("truncation_mode", "keep_start") != "keep_start":
            self._new("truncation_mode", "only keep_start is supported, which cuts the end of the response")
        for section, key in _REQUIRED.items():
            if not self.result.values[section].get(key):
                self.result.notes.append(Note(key, "missing", f"set {section}.{key}, or pass --{section}.{key} VALUE"))

    def _mixture(self) -> None:
        mixture = self.trl.take("datasets")
        if not mixture:
            return
        if not isinstance(mixture, list) or not all(isinstance(d, dict) for d in mixture):
            raise UserError(f"{self.trl.source}: datasets: expected a list of mappings, got {show(mixture)}")
        if len(mixture) > 1 or mixture[0].get("data_files") or mixture[0].get("data_dir") or not mixture[0].get("path"):
            self._stop("datasets", "one file, folder or Hub name is read; join the sets and name that as dataset_name")
            return
        for old, new in (("path", "dataset_name"), ("name", "dataset_config"), ("split", "dataset_train_split")):
            if mixture[0].get(old) is not None:
                self.trl.keys[new] = mixture[0][old]
        self._same("datasets", "-> data.dataset_name, its configuration and split")

    def _batch(self, num_processes: int | None) -> None:
        per_device = self.trl.whole("per_device_train_batch_size", 8)
        accumulation = self.trl.whole("gradient_accumulation_steps", 1)
        listed = self.trl.take("num_processes")
        processes = num_processes or (self.trl.as_whole("num_processes", listed) if listed is not None else 1)
        packing = self.result.values["packing"]
        packing["pairs_per_step"] = pairs = per_device * accumulation * processes
        factors = f"{per_device} x {accumulation} (gradient_accumulation_steps) x {processes} (processes)"
        self._same("per_device_train_batch_size", f"{factors} -> packing.pairs_per_step {pairs}")
        if listed is None and num_processes is None:
            self._same("num_processes", f"not given, so 1; convert with --num-processes N if {self.name} ran on more")
        if self.trl.take("accelerate_config") is not None:
            self._same("accelerate_config", "one process trains; --num-processes N keeps the batch of N")
        max_length = self.result.values["data"].get("max_length", 1024)
        if isinstance(max_length, int):
            packing["tokens_per_pack"] = tokens = per_device * 2 * max_length
            text = f"2 x {max_length} x {per_device} per device, {self.name}'s most -> packing.tokens_per_pack {tokens}"
            self._same("max_length", text)
        sampling = self.trl.take("train_sampling_strategy", "random")
        if sampling == "sequential":
            packing["shuffle"] = False
            self._same("train_sampling_strategy", "-> packing.shuffle false")
        elif sampling != "random":
            self._new("train_sampling_strategy", "rows are drawn at random; packs leave no padding to save")

    def _loss(self) -> None:
        loss = self.result.values["loss"]
        types = given if isinstance(given := self.trl.take("loss_type", ["sigmoid"]), list) else [given]
        loss["loss_type"] = types[0] if len(types) == 1 else types
        weights = self.trl.keys.get("loss_weights")
        if len(types) > 1:
            self._same("loss_type", f"{' + '.join(map(str, types))}, summed with loss.loss_weights as in TRL")
            if weights is not None:
                loss["loss_weights"] = [self.trl.as_number("loss_weights", w) for w in self.trl.take("loss_weights")]
        elif weights == [1] or weights == [1.0]:
            self.trl.take("loss_weights")
        if self.trl.keys.get("router_aux_loss_coef"):
            self._new("router_aux_loss_coef", "TRL balances experts within micro-batches, here within whole steps")
        self._copy("loss", *LOSS_OPTIONS)
        if loss.get("rpo_alpha") is not None:
            self._new("rpo_alpha", RPO_ALPHA)
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
        train["report_to"] = [name for name in ("tensorboard", "wandb") if name in trackers or "all" in trackers]
        for name in (t for t in trackers if t not in ("none", "all", "tensorboard", "wandb")):
            self._same("report_to", f"{name}: metrics.jsonl always has TRL's metrics under TRL's names")
        self._cadence("logging", "logging_steps", 10)
        self._cadence("save", "save_steps", 500)

    def _cadence(self, kind: str, key: str, default: int) -> None:
        """``KIND_strategy`` and ``KIND_steps``; every strategy but ``steps`` is replaced."""
        strategy, value = self.trl.take(f"{kind}_strategy", "steps"), self.trl.take(key)
        train = self.result.values["train"]
        if strategy in ("no", False) and kind == "save":
            train[key] = None
            self._same(f"{kind}_strategy", f"no -> train.{key} null")
        elif strategy != "steps":
            self._same(f"{kind}_strategy", f"{strategy}: here every train.{key} optimizer steps, {default} by default")
        elif value is not None:
            train[key] = self._steps(key, value)

    def _evaluation(self) -> None:
        data, train = self.result.values["data"], self.result.values["train"]
        strategy = self.trl.take("eval_strategy", self.trl.take("evaluation_strategy", "no"))
        steps, split = self.trl.take("eval_steps"), self.trl.take("dataset_test_split")
        # a YAML "no" is false
        if strategy in ("no", False):
            for key, value in (("eval_steps", steps), ("dataset_test_split", split)):
                if value is not None:
                    self._same(key, "no effect without eval_strategy")
            return
        if "eval_fraction" in data or data.get("eval_dataset_name"):
            split = None
        elif data.get("dataset_name"):
            data["eval_dataset_name"] = data["dataset_name"]
            data["eval_dataset_split"] = str(split or "test")
            self._same("eval_strategy", f"split {split or 'test'} -> data.eval_dataset_name, data.eval_dataset_split")
        if strategy == "steps":
            default = train.get("logging_steps", 10)
            train["eval_steps"] = self._steps("eval_steps", default if steps is None else steps)
        else:
            self._same("eval_strategy", f"{strategy}: evaluated once, after training; set train.eval_steps for more")

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

    def _put(self, section: str, key: str, value: Any, old: str) -> None:
        self.result.values[section][key] = value
        self._same(old, f"-> {section}.{key} {value}")

    def _copy(self, section: str, *keys: str) -> None:
        for key in keys:
            if key in self.trl.keys:
                self.result.values[section][key] = self.trl.take(key)

    def _same(self, key: str, text: str) -> None:
        compared = self.name == "TRL" and key in COMPARED
        self.result.notes.append(Note(key, "same" if compared else "told", text))

    def _new(self, key: str, text: str) -> None:
        self.result.notes.append(Note(key, "new", text))

    def _stop(self, key: str, text: str) -> None:
        self.stops.append(UserError(f"{self.trl.where(key)}: {text}; remove the key to convert without it"))

    def _steps(self, key: str, value: Any) -> int | float:
        """Steps, or a share of all steps below 1, as here."""
        number = self.trl.as_number(key, value)
        return number if number < 1 else int(number)
