"""ms-swift: `swift rlhf --rlhf_type dpo ...`, as a command or its options in YAML; and `megatron rlhf`."""

from __future__ import annotations

import math
import re
from typing import Any

from ...errors import UserError
from ..fields import show
from ..losses import UNPAIRED_LOSSES
from .entries import Entry, hold_out, name_run, put_data, put_evaluation, stop_early, weighted
from .ms_swift_keys import MARKS, RULES, SAME_NAMES
from .processes import read_division
from .reading import Reading, Trainer, as_list

_LOSSES = {"dpo": "sigmoid", "simpo": "simpo", "orpo": "orpo", "cpo": "cpo", "kto": "kto"}
_NAMED = re.compile(r"(?:(?:MS|HF)::)?(?P<name>[^:#]+)(?::(?P<subset>[^#]+))?(?:#(?P<rows>\d+))?")


def read(reading: Reading) -> None:
    """The keys that mean something together."""
    kind = reading.file.take("rlhf_type", "dpo")
    if not isinstance(kind, str) or kind not in _LOSSES:
        raise UserError(f"{reading.file.where('rlhf_type')}: {show(kind)} does not train on preferences; "
                        f"{', '.join(_LOSSES)} are converted")  # fmt: skip
    read_division(reading, "sequence_parallel_size context_parallel_size")
    _batch(reading, "rows" if kind == "kto" else "pairs")
    if kind == "kto":
        _labels(reading)
    else:
        _loss(reading, kind)
    _adapter(reading)
    _precision(reading)
    _data(reading)
    _schedule(reading)
    _reference(reading)


def _batch(reading: Reading, unit: str) -> None:
    file = reading.file
    size = file.whole("per_device_train_batch_size", file.whole("micro_batch_size", 1))
    reading.hand("per_device_train_batch_size", size)
    if (total := file.take("global_batch_size")) is not None:
        total = file.as_whole("global_batch_size", total)
        reading.put("packing.pairs_per_step", total, "global_batch_size")
        return
    steps = file.take("gradient_accumulation_steps")
    if steps is None:
        steps = max(1, math.ceil(16 / size / reading.processes))
        reading.tell(
            "gradient_accumulation_steps", f"not given: ms-swift's default, {steps}, so that a step has 16 {unit}"
        )
    reading.hand("gradient_accumulation_steps", steps)


def _loss(reading: Reading, kind: str) -> None:
    file = reading.file
    types = file.take("loss_type", _LOSSES[kind]) if kind == "dpo" else _LOSSES[kind]
    reading.put("loss.loss_type", types[0] if isinstance(types, list) and len(types) == 1 else types)
    reading.tell("loss_type", f"-> loss.loss_type {types}")
    if (weights := file.take("loss_weights")) is not None:
        numbers = [file.as_number("loss_weights", w) for w in as_list(reading, "loss_weights", weights)]
        reading.put("loss.loss_weights", numbers, "loss_weights")
    reading.put("loss.beta", file.number("beta", 2.0 if kind == "simpo" else 0.1), "beta")
    if smoothing := file.number("label_smoothing", 0.0):
        reading.put("loss.label_smoothing", smoothing, "label_smoothing")
    gamma, alpha = file.number("simpo_gamma", 1.0), file.number("cpo_alpha", 1.0)
    if kind == "simpo":
        reading.put("loss.simpo_gamma", gamma, "simpo_gamma")
        if alpha:
            reading.put("loss.loss_type", ["simpo", "sft"])
            reading.put("loss.loss_weights", [1.0, alpha])
            text = f"simpo with {alpha:g} of the likelihood of the chosen response, as ms-swift's default; 0 is SimPO"
            reading.changes("cpo_alpha", text)
    elif kind == "cpo":
        reading.put("loss.cpo_alpha", alpha, "cpo_alpha")
    if (alpha := file.take("rpo_alpha")) is not None:
        reading.put("loss.rpo_alpha", file.as_number("rpo_alpha", alpha), "rpo_alpha")
        if reading.trl["per_device_train_batch_size"] > 1:
            text = "ms-swift averages the tokens of all chosen responses of a device; here every response counts alike"
            reading.changes("rpo_alpha", text)
    if (tail := file.take("ld_alpha")) is not None:
        reading.put("loss.ld_alpha", file.as_number("ld_alpha", tail))
        reading.changes("ld_alpha", "ms-swift weighs the policy's log-probs alone, here the reference's, too")
    if (scale := file.take("loss_scale", "last_round")) != "last_round":
        reading.changes("loss_scale", f"{scale} is not supported; the last response is in the loss, all of it")


def _labels(reading: Reading) -> None:
    """The loss of kto."""
    file = reading.file
    given = file.take("loss_type", "kto")
    kind = given[0] if isinstance(given, list) and len(given) == 1 else given
    if not isinstance(kind, str) or kind not in UNPAIRED_LOSSES:
        reading.stop("loss_type", f"{show(given)} is no loss of kto", "take kto or apo_zero_unpaired")
        return
    reading.hand("loss_type", kind)
    reading.hand("beta", file.number("beta", 0.1))
    for name in ("desirable_weight", "undesirable_weight"):
        reading.hand(name, file.number(name, 1.0))
    for key in ("loss_weights", "label_smoothing", "simpo_gamma", "cpo_alpha", "rpo_alpha", "ld_alpha"):
        if (value := file.take(key)) is not None:
            reading.tell(key, f"{show(value)}: no effect on kto")
    reading.hand("train_sampling_strategy", "random")
    if kind == "kto":
        text = (
            "ms-swift compares rows with the completions of an order drawn once, here of the steps of the first epoch"
        )
        reading.changes("rlhf_type", text)


def _adapter(reading: Reading) -> None:
    file = reading.file
    named, kind = reading.first("tuner_type train_type sft_type", "lora")
    adapters, targets, pattern = file.take("adapters"), file.take("target_modules"), file.take("target_regex")
    if kind not in ("lora", "full"):
        reading.stop(named, f"{show(kind)} is not supported", "take lora or full")
        return
    if kind == "full":
        for key in [key for key in ("lora_rank", "lora_alpha", "lora_dropout") if key in file.keys]:
            reading.tell(key, f"{file.take(key)}: no effect on a full model")
        return
    init = str(file.take("init_weights", "true")).lower()
    if init != "true":
        reading.stop("init_weights", f"{init} is not supported; adapters start as peft's do")
    if adapters:
        paths = as_list(reading, "adapters", adapters)
        if len(paths) > 1:
            reading.stop("adapters", "one adapter is trained further", "merge the others into the model")
        reading.put("model.adapter_name_or_path", str(paths[0]), "adapters")
        references = as_list(reading, "ref_adapters", file.take("ref_adapters") or [])
        if references == paths:
            reading.tell("ref_adapters", "a frozen copy of the adapter is the reference")
        elif references:
            reading.stop("ref_adapters", "another adapter as the reference is not loaded", "merge it into its model")
        elif "model" in file.keys:
            reading.put("reference.model_name_or_path", str(file.keys["model"]))
            reading.tell("adapters", "the model without adapters is the reference, as in ms-swift")
    else:
        reading.hand("use_peft", True, named)
        names = as_list(reading, "target_modules", targets) if targets else ["all-linear"]
        chosen: Any = "all-linear" if names == ["all-linear"] else names
        if "all-linear" in names and len(names) > 1:
            reading.stop("target_modules", "all-linear beside other modules cannot be said here", "list all modules")
        reading.hand("lora_target_modules", str(pattern) if pattern else chosen, "target_modules")
    _quantization(reading)


def _quantization(reading: Reading) -> None:
    file = reading.file
    method, bits = file.take("quant_method"), file.take("quant_bits")
    kind, nested = file.take("bnb_4bit_quant_type", "nf4"), file.flag("bnb_4bit_use_double_quant", True)
    if method is None:
        return
    if method != "bnb" or bits not in (4, 8):
        reading.stop("quant_method", f"{bits} bits by {method} are not supported", "take 4 bits by bnb")
    elif bits == 8:
        reading.hand("load_in_8bit", True, "quant_bits")
    elif reading.trl.get("use_peft"):
        reading.hand("load_in_4bit", True, "quant_bits")
        reading.hand("bnb_4bit_quant_type", kind)
        reading.hand("use_bnb_nested_quant", nested, "bnb_4bit_use_double_quant")
    else:
        reading.put("model.quantization", str(kind), "quant_bits")


def _precision(reading: Reading) -> None:
    file = reading.file
    held, bf16, half = str(file.take("torch_dtype", "auto")), file.take("bf16"), file.take("fp16")
    if held == "auto":
        reading.tell("torch_dtype", "not given: the checkpoint's own in ms-swift, taken to be bfloat16")
    held = "bfloat16" if held == "auto" else held
    if half or (half is None and held == "float16"):
        reading.hand("fp16", True)
    reading.hand("bf16", bool(bf16) if bf16 is not None else held == "bfloat16")
    reading.hand("dtype", held, "torch_dtype")


def _data(reading: Reading) -> None:
    file = reading.file
    hub = file.flag("use_hf")
    names = file.take("dataset")
    if not names:
        raise UserError(f"{file.where('dataset')}: missing; name a data set")
    mapping = file.mapping("columns")
    unpaired = reading.trl.get("loss_type") in UNPAIRED_LOSSES
    given = {str(part): str(name) for name, part in mapping.items()}
    columns = _labelled(given) if unpaired and given else {_PART.get(part, part): name for part, name in given.items()}
    kind = "labelled" if unpaired and given else None
    entries = [_entry(str(name), columns, kind) for name in as_list(reading, "dataset", names)]
    put_data(reading, "dataset", weighted(reading, "interleave_prob", entries))
    if not hub:
        text = "ms-swift looks for models and data on ModelScope; here the Hugging Face Hub is asked, by the same names"
        reading.changes("use_hf", text)
    validation = file.take("val_dataset")
    share = file.number("split_dataset_ratio", 0.0)
    if file.keys.get("eval_strategy") == "no":
        share, validation = 0.0, None
    if validation:
        listed = [_entry(str(name), columns, kind) for name in as_list(reading, "val_dataset", validation)]
        put_evaluation(reading, "val_dataset", listed)
    else:
        hold_out(reading, "split_dataset_ratio", share)
    if (system := file.take("system")) is not None:
        reading.put("data.system", str(system), "system")
    if file.take("dataset_shuffle", True) is False or file.take("train_dataloader_shuffle", True) is False:
        reading.hand("train_sampling_strategy", "sequential", "train_dataloader_shuffle")
    reading.changes("template", f"{file.take('template') or 'its own for the model'}: a template of ms-swift; here the "
                    "tokenizer's is used, or a Jinja file in data.chat_template")  # fmt: skip
    if (cut := file.take("truncation_strategy", "delete")) != "right":
        what = "drops longer rows" if cut == "delete" else f"cuts them by {cut}"
        reading.changes("truncation_strategy", f"ms-swift {what}; here the end of the response is cut")


_PART = {"query": "prompt", "response": "chosen", "rejected_response": "rejected"}


def _labelled(given: dict[str, str]) -> dict[str, str]:
    """Columns of rows with one answer and a label, by what ms-swift calls its parts."""
    parts = {"messages": "messages"} if "messages" in given else {"query": "prompt", "response": "completion"}
    parts |= {"label": "label"}
    return {parts.get(part, part): name for part, name in ({part: part for part in parts} | given).items()}


def _entry(name: str, columns: dict[str, str], kind: str | None) -> Entry:
    match = None if name.startswith(("/", ".")) else _NAMED.fullmatch(name)
    if match is None:
        name, _, rows = name.partition("#")
        return Entry(name, rows=int(rows) if rows.isdigit() else None, columns=columns, format=kind)
    rows = match["rows"]
    return Entry(match["name"], match["subset"], rows=int(rows) if rows else None, columns=columns, format=kind)


def _schedule(reading: Reading) -> None:
    file = reading.file
    full = not reading.trl.get("use_peft") and "adapter_name_or_path" not in reading.values.get("model", {})
    rate_name, rate = reading.first("learning_rate lr", None)
    if rate is None:
        rate = 1e-5 if full else 1e-4
        reading.tell(
            "learning_rate", f"not given: ms-swift's default, {rate:g} for {'full models' if full else 'adapters'}"
        )
    reading.hand("learning_rate", rate, rate_name)
    least = file.take("min_lr")
    named, schedule = reading.first("lr_scheduler_type lr_decay_style", "cosine")
    if least and schedule == "cosine":
        schedule = "cosine_with_min_lr"
        reading.hand("lr_scheduler_kwargs", {"min_lr": file.as_number("min_lr", least)}, "min_lr")
    reading.hand("lr_scheduler_type", schedule, named)
    has_data = {"eval_fraction", "eval_dataset_name"} & set(reading.values.get("data", {}))
    strategy, steps = file.take("eval_strategy"), file.take("eval_steps")
    saving = file.keys.get("save_strategy", "steps")
    strategy = saving if strategy is None else strategy
    if has_data and strategy not in ("no", False):
        reading.hand("eval_strategy", strategy)
        if strategy == "steps":
            reading.hand("eval_steps", steps if steps is not None else file.keys.get("save_steps", 500))
    elif steps is not None:
        reading.tell("eval_steps", "no effect without rows to evaluate")
    stop_early(reading, "early_stop_interval")
    name_run(reading, "swanlab_project", "swanlab_exp_name")


def _reference(reading: Reading) -> None:
    if (name := reading.file.take("ref_model")) is not None:
        reading.put("reference.model_name_or_path", str(name), "ref_model")
    if (references := reading.file.take("ref_adapters")) and "adapters" not in reading.file.keys:
        reading.stop(
            "ref_adapters", f"{references}: a reference of an adapter is not loaded", "merge it into its model"
        )


MS_SWIFT = Trainer(
    name="ms-swift",
    marks=MARKS,
    rules=RULES,
    defaults={
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": 5,
        "report_to": ["tensorboard"],
        "router_aux_loss_coef": 0.0,
        "lora_r": 8,
        "max_length": None,
        "output_dir": "output",
    },
    read=read,
    same_names=SAME_NAMES,
)
