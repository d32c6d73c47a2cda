"""LLaMA-Factory: a flat YAML with `stage: dpo` or `kto`; its data sets are described in a `dataset_info.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..fields import nearest, show
from .entries import Entry, hold_out, name_run, put_data, put_evaluation, stop_early, weighted
from .llama_factory_keys import MARKS, RULES, SAME_NAMES
from .reading import Reading, Trainer, as_list
from .transformers_keys import TRANSFORMERS_DEFAULTS

_LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
_INFO = "dataset_info.json"
_SPEAKERS = {"human", "gpt", "user", "assistant", "system", "observation", "function_call", "function", "tool"}
"""Names that are known without a word."""


def read(reading: Reading) -> None:
    """The keys that mean something together."""
    stage = reading.file.take("stage", "sft")
    if stage == "kto":
        _labels(reading)
    elif stage == "dpo":
        _loss(reading)
    else:
        text = f"{show(stage)} does not train on preferences; dpo and kto are converted"
        raise UserError(f"{reading.file.where('stage')}: {text}")
    _router(reading)
    _adapter(reading)
    _reference(reading)
    _precision(reading)
    _data(reading)
    _model(reading)


def _loss(reading: Reading) -> None:
    file = reading.file
    kind, bco = file.take("pref_loss", "sigmoid"), file.number("pref_bco_weight", 0.0)
    if kind in ("kto", "kto_pair"):
        reading.stop("pref_loss", "KTO is a stage of its own", "set stage to kto, with rows that have a kto_tag")
        return
    if not isinstance(kind, str) or kind not in _LOSSES:
        reading.stop("pref_loss", f"{show(kind)} is not a loss on pairs here", f"take one of {', '.join(_LOSSES)}")
        return
    reading.hand("beta", file.number("pref_beta", 0.1), "pref_beta")
    if bco:
        reading.put("loss.loss_type", [kind, "bco_pair"])
        reading.put("loss.loss_weights", [1 / (1 + bco), bco / (1 + bco)])
        reading.tell("pref_bco_weight", f"-> loss.loss_type {kind} + bco_pair, divided by 1 + {bco:g}")
    else:
        reading.put("loss.loss_type", kind, "pref_loss")
    if smoothing := file.number("dpo_label_smoothing", 0.0):
        reading.put("loss.label_smoothing", smoothing, "dpo_label_smoothing")
    if weight := file.number("pref_ftx", 0.0):
        reading.put("loss.rpo_alpha", weight, "pref_ftx")
    if kind == "simpo":
        reading.put("loss.simpo_gamma", file.number("simpo_gamma", 0.5), "simpo_gamma")
    if (tail := file.take("ld_alpha")) is not None:
        reading.put("loss.ld_alpha", file.as_number("ld_alpha", tail))
        reading.changes("ld_alpha", "LLaMA-Factory weighs the policy's log-probs alone, here the reference's, too")


def _labels(reading: Reading) -> None:
    """The loss of stage kto."""
    file = reading.file
    reading.hand("loss_type", "kto", "stage")
    reading.hand("beta", file.number("pref_beta", 0.1), "pref_beta")
    reading.hand("desirable_weight", file.number("kto_chosen_weight", 1.0), "kto_chosen_weight")
    reading.hand("undesirable_weight", file.number("kto_rejected_weight", 1.0), "kto_rejected_weight")
    if file.number("pref_ftx", 0.0):
        reading.stop("pref_ftx", "kto takes no likelihood of its desirable completions beside it")
    for key in ("pref_loss", "pref_bco_weight", "dpo_label_smoothing", "simpo_gamma", "ld_alpha"):
        if (value := file.take(key)) is not None:
            reading.tell(key, f"{show(value)}: no effect on stage kto")
    reading.hand("train_sampling_strategy", "random")
    reading.changes("stage", "LLaMA-Factory compares a row with the completion before it in the file, here in the step")


def _router(reading: Reading) -> None:
    file = reading.file
    router = file.take("moe_aux_loss_coef")
    reading.hand("router_aux_loss_coef", router or 0.0, "moe_aux_loss_coef")
    if router:
        reading.trl.pop("router_aux_loss_coef")
        reading.put("loss.router_aux_loss_coef", file.as_number("moe_aux_loss_coef", router))
        reading.changes(
            "moe_aux_loss_coef", "here it is trained; LLaMA-Factory does not add it to its loss of preferences"
        )


def _adapter(reading: Reading) -> None:
    file = reading.file
    kind = file.take("finetuning_type", "lora")
    rank, alpha = file.whole("lora_rank", 8), file.take("lora_alpha")
    target, further = file.take("lora_target", "all"), file.take("additional_target")
    trained, fresh = file.take("adapter_name_or_path"), file.flag("create_new_adapter")
    if kind not in ("lora", "full"):
        reading.stop("finetuning_type", f"{show(kind)} is not supported", "take lora or full")
        return
    if kind == "full":
        return
    if trained is not None:
        paths = as_list(reading, "adapter_name_or_path", trained)
        if len(paths) != 1 or fresh:
            reading.stop(
                "adapter_name_or_path", "adapters below a fresh one are not supported", "merge them into the model"
            )
            return
        reading.put("model.adapter_name_or_path", str(paths[0]), "adapter_name_or_path")
    else:
        reading.hand("use_peft", True, "finetuning_type")
        reading.hand("lora_r", rank, "lora_rank")
        reading.hand("lora_alpha", alpha or 2 * rank, "lora_alpha")
        names = as_list(reading, "lora_target", target)
        reading.hand("lora_target_modules", "all-linear" if names == ["all"] else names, "lora_target")
        if further:
            reading.hand("lora_modules_to_save", as_list(reading, "additional_target", further), "additional_target")
    _quantization(reading)


def _quantization(reading: Reading) -> None:
    file = reading.file
    bits, method = file.take("quantization_bit"), file.take("quantization_method", "bnb")
    kind, nested = file.take("quantization_type", "nf4"), file.flag("double_quantization", True)
    if bits is None:
        return
    if method not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        reading.stop("quantization_bit", f"{bits} bits by {method} are not supported", "take 4 bits by bnb")
    elif bits == 8:
        reading.hand("load_in_8bit", True, "quantization_bit")
    elif reading.trl.get("use_peft"):
        reading.hand("load_in_4bit", True, "quantization_bit")
        reading.hand("bnb_4bit_quant_type", kind, "quantization_type")
        reading.hand("use_bnb_nested_quant", nested, "double_quantization")
    else:
        reading.put("model.quantization", str(kind), "quantization_bit")


def _reference(reading: Reading) -> None:
    file = reading.file
    name = file.take("ref_model")
    if file.take("ref_model_adapters") is not None:
        reading.stop("ref_model_adapters", "a reference of an adapter is not loaded", "merge it into its model")
    if name is not None:
        reading.put("reference.model_name_or_path", str(name), "ref_model")
    elif "adapter_name_or_path" in reading.values.get("model", {}) and "model_name_or_path" in file.keys:
        reading.put("reference.model_name_or_path", str(file.keys["model_name_or_path"]))
        reading.tell("adapter_name_or_path", "the model without adapters is the reference, as in LLaMA-Factory")


def _precision(reading: Reading) -> None:
    file = reading.file
    bf16, half, pure = file.flag("bf16"), file.flag("fp16"), file.flag("pure_bf16")
    reading.hand("bf16", bf16 or pure)
    if half:
        reading.hand("fp16", True)
    trains_all = not reading.trl.get("use_peft") and "adapter_name_or_path" not in reading.values.get("model", {})
    # Trained weights are raised to float32 unless pure_bf16.
    low = pure or (not trains_all and (bf16 or half))
    reading.hand("dtype", ("bfloat16" if bf16 or pure else "float16") if low else "float32", "pure_bf16")


def _data(reading: Reading) -> None:
    file = reading.file
    folder, names = file.take("dataset_dir", "data"), file.take("dataset")
    if names is None:
        raise UserError(f"{file.where('dataset')}: missing; name a data set")
    info = _info(reading, folder)
    samples = file.take("max_samples")
    if samples is not None:
        reading.put("data.max_rows", file.as_whole("max_samples", samples), "max_samples")
    entries = [_entry(reading, "dataset", str(name), folder, info) for name in as_list(reading, "dataset", names)]
    put_data(
        reading, "dataset", weighted(reading, "interleave_probs", [entry for entry in entries if entry is not None])
    )
    if (strategy := file.take("mix_strategy", "concat")) != "concat":
        reading.changes("mix_strategy", f"{strategy}: here an epoch has as many rows as all sets together")
    size, evaluated = file.number("val_size", 0.0), file.take("eval_dataset")
    if evaluated:
        listed = as_list(reading, "eval_dataset", evaluated)
        found = [_entry(reading, "eval_dataset", str(name), folder, info) for name in listed]
        put_evaluation(reading, "eval_dataset", [entry for entry in found if entry is not None])
    else:
        hold_out(reading, "val_size", size)
    if file.take("disable_shuffling"):
        reading.hand("train_sampling_strategy", "sequential", "disable_shuffling")
    if (system := file.take("default_system")) is not None:
        reading.put("data.system", str(system), "default_system")
    reading.changes(
        "template",
        f"{file.take('template') or 'none'} is a template of LLaMA-Factory; here the tokenizer's own is used, or a "
        "Jinja file in data.chat_template",
    )
    reading.changes("cutoff_len", "LLaMA-Factory cuts prompt and response in proportion; here the response is cut")


def _info(reading: Reading, folder: Any) -> dict[str, Any] | None:
    """What ``dataset_info.json`` says; None where names are those of the Hub."""
    if isinstance(folder, dict):
        return folder
    if folder == "ONLINE":
        return None
    source = Path(reading.file.source).parent
    places = [base / _INFO for base in (Path(str(folder)), source / str(folder), source, source.parent / str(folder))]
    for path in places:
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path}: not JSON: {error}") from None
            if isinstance(found, dict):
                return found
    raise UserError(
        f"{reading.file.where('dataset')}: no {_INFO} in {folder}, nor beside the file, which says what the data sets "
        "are; convert in the folder where LLaMA-Factory was started, or copy it here"
    )


def _entry(reading: Reading, key: str, name: str, folder: Any, info: dict[str, Any] | None) -> Entry | None:
    if info is None:
        return Entry(name)
    if name not in info:
        close = nearest(name, info)
        advice = f"; did you mean {close}?" if close else ""
        raise UserError(f"{reading.file.where(key)}: {name} is not in {_INFO}{advice}")
    said = info[name]
    if url := said.get("hf_hub_url") or said.get("ms_hub_url") or said.get("om_hub_url"):
        where = str(url)
        if "hf_hub_url" not in said:
            reading.changes(key, f"{where} is of another hub; here it is looked for on Hugging Face")
    elif file := said.get("file_name"):
        where = str(Path(str(folder)) / str(file)) if not isinstance(folder, dict) else str(file)
    else:
        reading.stop(key, f"{name} is read by a script or from a cloud", "write its rows to a file")
        return None
    columns = said.get("columns") or {}
    labelled = reading.trl.get("loss_type") == "kto"
    if labelled and (said.get("ranking") or not columns.get("kto_tag")):
        reading.stop(key, f"{name} has pairs or no column kto_tag in {_INFO}, and stage is kto", "name another")
        return None
    if not labelled and not said.get("ranking"):
        reading.stop(key, f"{name} has no pairs: ranking is not true in {_INFO}", "name another")
        return None
    if seen := [part for part in ("images", "videos", "audios") if columns.get(part)]:
        reading.stop(key, f"{name} has {', '.join(seen)}, which are not read", "name another")
        return None
    settings = _sharegpt(columns, said) if said.get("formatting") in ("sharegpt", "openai") else _alpaca(columns)
    settings |= {"format": "labelled"} if labelled else {}
    config, rows = said.get("subset"), said.get("num_samples")
    return Entry(where, config, str(said.get("split", "train")), rows=rows, **settings)


def _sharegpt(columns: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    tags = said.get("tags") or {}
    parts = {part: str(columns[part]) for part in ("chosen", "rejected", "system", "tools") if columns.get(part)}
    messages = str(columns.get("messages") or "conversations")
    fields = {}
    if tags.get("role_tag", "from") not in ("from", "role") or tags.get("content_tag", "value") not in (
        "value",
        "content",
    ):
        fields = {"role": str(tags.get("role_tag", "from")), "content": str(tags.get("content_tag", "value"))}
    named = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
    roles = {str(tags[tag]): role for tag, role in named.items() if tags.get(tag) and tags[tag] not in _SPEAKERS}
    found: dict[str, Any] = {"turn_fields": fields, "roles": roles, "columns": parts}
    if columns.get("kto_tag"):
        found["columns"] = {"messages": messages, "label": str(columns["kto_tag"]), **parts}
    elif messages != "conversations":
        found |= {"format": "messages", "columns": {"messages": messages, **parts}}
    return found


def _alpaca(columns: dict[str, Any]) -> dict[str, Any]:
    parts = {"prompt": "instruction", "query": "input"} if not columns else dict(columns)
    names = {"query": "input", "response": "completion", "kto_tag": "label"}
    answers = ("response", "kto_tag") if parts.get("kto_tag") else ("chosen", "rejected")
    wanted = ("prompt", "query", "system", "history", *answers)
    found = {names.get(part, part): str(parts[part]) for part in wanted if parts.get(part)}
    return {"format": "conversation", "columns": found}


LLAMA_FACTORY = Trainer(
    name="LLaMA-Factory",
    marks=MARKS,
    rules=RULES,
    defaults={
        **{key: value for key, value in TRANSFORMERS_DEFAULTS.items() if key != "gradient_checkpointing"},
        "max_length": 2048,
        "lora_dropout": 0.0,
    },
    read=read,
    same_names=SAME_NAMES,
)


def _model(reading: Reading) -> None:
    file = reading.file
    attention = file.take("flash_attn", "auto")
    known = {"fa2": "flash_attention_2", "sdpa": "sdpa", "auto": None, "disabled": "eager"}
    if known.get(str(attention), str(attention)):
        reading.hand("attn_implementation", known.get(str(attention), str(attention)), "flash_attn")
    if file.flag("disable_gradient_checkpointing"):
        reading.hand("gradient_checkpointing", False, "disable_gradient_checkpointing")
    strategy = file.take("eval_strategy", file.take("evaluation_strategy", "no"))
    has_data = {"eval_fraction", "eval_dataset_name"} & set(reading.values.get("data", {}))
    if has_data:
        reading.hand("eval_strategy", "epoch" if strategy in ("no", False) else strategy, "eval_strategy")
    elif strategy not in ("no", False):
        reading.tell("eval_strategy", "no effect without eval_dataset or val_size")
        file.take("eval_steps")
    stop_early(reading, "early_stopping_steps")
    name_run(reading, "swanlab_project", "swanlab_run_name")
