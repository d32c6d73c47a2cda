"""Axolotl: a flat YAML with `base_model`, `rl: dpo` and a list of data sets. It trains with TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UserError
from ..fields import show
from .axolotl_keys import MARKS, NAMES, PROJECTS, RULES, SAME_NAMES, TRACKERS
from .entries import Entry, hold_out, name_run, put_data, put_evaluation, stop_early
from .processes import read_division, read_kernels
from .reading import Reading, Trainer

_LOSSES = {"dpo": None, "ipo": "ipo", "simpo": "simpo", "orpo": "orpo", "kto": "kto"}
_PROMPTS = {"intel": "question", "icr": "input", "prompt_pairs": "prompt", "argilla": "instruction"}
"""The column of the prompt, for each kind of row of the types chatml and llama3."""
_LABELLED_PROMPTS = {"intel": "question", "prompt_pairs": "prompt", "argilla": "instruction", "ultra": "prompt"}
"""The same of rows of KTO, whose answer is their completion."""


def read(reading: Reading) -> None:
    """The keys that mean something together."""
    _loss(reading)
    _data(reading)
    _adapter(reading)
    _precision(reading)
    _optimizer(reading)
    _cadence(reading)
    _model(reading)
    read_kernels(reading, "liger_rope liger_rms_norm liger_glu_activation", "torch_compile")
    sizes = {"shards": "dp_shard_size", "copies": "dp_replicate_size"}
    read_division(reading, "context_parallel_size sequence_parallel_degree", **sizes)


def _loss(reading: Reading) -> None:
    file = reading.file
    kind = file.take("rl")
    if not isinstance(kind, str) or kind not in _LOSSES:
        what = (
            "no rl: its data are no preference pairs" if kind is None else f"{show(kind)} does not train on preferences"
        )
        raise UserError(f"{file.where('rl')}: {what}; {', '.join(_LOSSES)} are converted")
    types, weights = file.take("dpo_loss_type"), file.take("dpo_loss_weights")
    nested = file.mapping("trl")
    beta, orpo = nested.pop("beta", None), file.take("orpo_alpha")
    named, given = reading.first("rl_beta dpo_beta", orpo)
    if beta is not None or given is not None:
        reading.hand("beta", given if beta is None else beta, named if beta is None else "trl")
    for key in nested:
        reading.changes(f"trl.{key}", "not read for pairs; dropped")
    if kind == "dpo":
        reading.hand("loss_type", types or ["sigmoid"], "dpo_loss_type")
        if weights is not None:
            reading.hand("loss_weights", weights, "dpo_loss_weights")
    elif kind == "kto":
        _labels(reading)
    elif kind == "simpo":
        alpha = file.number("cpo_alpha", 1.0)
        reading.put("loss.loss_type", ["simpo", "sft"] if alpha else "simpo")
        if alpha:
            reading.put("loss.loss_weights", [1.0, alpha])
            reading.changes("cpo_alpha", f"simpo with {alpha:g} of the likelihood of the chosen response, as TRL's CPO "
                            "trainer, whose default that is; 0 is the SimPO of the paper")  # fmt: skip
        reading.put("loss.simpo_gamma", file.number("simpo_gamma", 0.5), "simpo_gamma")
    else:
        reading.put("loss.loss_type", _LOSSES[kind], "rl")
        if kind == "orpo":
            reading.changes("rl", "TRL's ORPO takes the likelihood of prompt and response, here of the response")
    reading.tell("rl", f"{kind} -> loss.loss_type")


def _labels(reading: Reading) -> None:
    """The loss of KTO, and the order of its rows."""
    file = reading.file
    reading.hand("loss_type", "kto", "rl")
    for name in ("desirable_weight", "undesirable_weight"):
        # Axolotl takes 0 for the default, 1.
        reading.hand(name, file.number(f"kto_{name}", 1.0) or 1.0, f"kto_{name}")
    for key in [key for key in file.keys if key.startswith("dpo_")]:
        reading.tell(key, f"{show(file.take(key))}: no effect on kto")
    fixed = file.keys.get("shuffle_merged_datasets") is False or bool(file.keys.get("curriculum_sampling"))
    reading.hand("train_sampling_strategy", "sequential" if fixed else "random")


def _data(reading: Reading) -> None:
    listed = _mappings(reading, "datasets")
    put_data(reading, "datasets", [_entry(reading, "datasets", one) for one in listed])
    tests = _mappings(reading, "test_datasets")
    size = reading.file.number("val_set_size", 0.0)
    if tests:
        evaluated = [_entry(reading, "test_datasets", {"split": "train", **one}) for one in tests]
        put_evaluation(reading, "test_datasets", evaluated)
    else:
        hold_out(reading, "val_set_size", size)
    template, jinja = reading.file.take("chat_template"), reading.file.take("chat_template_jinja")
    if jinja is not None and Path(str(jinja)).suffix in (".jinja", ".jinja2"):
        reading.put("data.chat_template", str(jinja), "chat_template_jinja")
    elif jinja is not None:
        reading.stop(
            "chat_template_jinja", "a template is read from a file", "write it to one and name that, ending in .jinja"
        )
    elif template not in (None, "tokenizer_default"):
        reading.changes("chat_template", f"{template} is a template of Axolotl; here the tokenizer's own is used, or a "
                        "Jinja file in data.chat_template")  # fmt: skip
    if reading.file.take("excess_length_strategy", "drop") != "truncate":
        reading.changes("excess_length_strategy", "Axolotl drops rows longer than sequence_len; here responses are cut")
    if (message := reading.file.take("default_system_message")) is not None:
        reading.put("data.system", str(message), "default_system_message")


def _mappings(reading: Reading, key: str) -> list[dict[str, Any]]:
    listed = reading.file.take(key) or []
    if not isinstance(listed, list) or not all(isinstance(one, dict) and one.get("path") for one in listed):
        raise UserError(f"{reading.file.where(key)}: expected a list of mappings with path, got {show(listed)}")
    return listed


def _entry(reading: Reading, key: str, listed: dict[str, Any]) -> Entry:
    known = dict(listed)
    name, kind, files = str(known.pop("path")), known.pop("type", None), known.pop("data_files", None)
    known.pop("ds_type", None)
    parts = tuple(map(str, files if isinstance(files, list) else [files] if files else []))
    # the name of a format, with the files beside it
    if len(parts) == 1 and name in ("json", "parquet", "csv", "text"):
        name, parts = parts[0], ()
    split, config = str(known.pop("split", None) or "train"), known.pop("name", None)
    settings = _row_settings(reading, key, kind, known)
    for left in [one for one, value in known.items() if value is not None]:
        reading.changes(f"{key}.{left}", "not read here; dropped")
    return Entry(name, None if config is None else str(config), split, data_files=parts, **settings)


def _row_settings(reading: Reading, key: str, kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Format and columns of the rows of a ``type``."""
    if reading.trl.get("loss_type") == "kto":
        return _labelled_rows(reading, key, kind)
    if isinstance(kind, dict):
        parts = {part: str(kind.get(f"field_{part}") or part) for part in ("prompt", "system", "chosen", "rejected")}
        if any(kind.get(f"{part}_format") not in (None, f"{{{part}}}") for part in ("prompt", "chosen", "rejected")):
            reading.changes(f"{key}.type", "formats of its own; here the chat template writes turns")
        return {"format": "conversation", "columns": {p: c for p, c in parts.items() if f"field_{p}" in kind}}
    if kind is None or str(kind).startswith("passthrough"):
        return {}
    family, _, variant = str(kind).partition(".")
    if family == "chat_template" and variant in ("default", ""):
        fields = known.pop("message_property_mappings", None) or {}
        roles = {old: role for role, names in (known.pop("roles", None) or {}).items() for old in names}
        parts = {p: str(known.pop(f"field_{p}", None) or p) for p in ("messages", "chosen", "rejected")}
        return {"format": "messages", "columns": parts, "turn_fields": fields, "roles": roles}
    if family in ("chatml", "llama3"):
        _own_template(reading, key, kind)
        if variant in _PROMPTS:
            answers = {p: f"{p}_response" for p in ("chosen", "rejected")} if variant == "argilla" else {}
            return {"format": "conversation", "columns": {"prompt": _PROMPTS[variant], **answers}}
        if variant in ("argilla_chat", "ultra", "default", ""):
            return {}
    if family == "chat_template" and variant == "argilla_chat":
        return {}
    reading.stop(f"{key}", f"rows of type {kind} are not known here", "give the type user_defined with field_prompt, "
                 "field_chosen and field_rejected")  # fmt: skip
    return {}


def _labelled_rows(reading: Reading, key: str, kind: Any) -> dict[str, Any]:
    """The same of rows with one completion and a label."""
    if isinstance(kind, dict):
        columns = {part: str(kind.get(f"field_{part}") or part) for part in ("prompt", "completion", "label")}
        if all(kind.get(f"{part}_format") in (None, "", f"{{{part}}}") for part in ("prompt", "completion")):
            # Their text as it stands, without a template.
            return {"format": "unpaired", "columns": columns}
        reading.changes(f"{key}.type", "formats of its own; here the chat template writes turns")
        system = {"system": str(kind["field_system"])} if kind.get("field_system") else {}
        return {"format": "labelled", "columns": columns | system}
    if kind is None or str(kind).startswith("passthrough"):
        return {}
    family, _, variant = str(kind).partition(".")
    if family in ("chatml", "llama3") and variant in (*_LABELLED_PROMPTS, "argilla_chat"):
        _own_template(reading, key, kind)
        # The completion of a chat is the whole conversation.
        chat = variant == "argilla_chat"
        columns = {"messages": "completion"} if chat else {"prompt": _LABELLED_PROMPTS[variant]}
        return {"format": "labelled", "columns": columns}
    reading.stop(f"{key}", f"rows of type {kind} are not known here for kto", "give the type user_defined with "
                 "field_prompt, field_completion and field_label")  # fmt: skip
    return {}


def _own_template(reading: Reading, key: str, kind: Any) -> None:
    reading.changes(f"{key}.type", f"{kind} writes the tokens of {str(kind).partition('.')[0]} itself; here the chat "
                    "template does, the tokenizer's own unless data.chat_template names a file")  # fmt: skip


def _adapter(reading: Reading) -> None:
    file = reading.file
    kind, trained = file.take("adapter"), file.take("lora_model_dir")
    linear, modules = file.flag("lora_target_linear"), file.take("lora_target_modules")
    four, eight = file.flag("load_in_4bit"), file.flag("load_in_8bit")
    if kind is None:
        for key in [key for key in file.keys if key.startswith(("lora_", "peft_"))]:
            reading.tell(key, f"no effect without adapter: {file.take(key)}")
        reading.hand("load_in_4bit", four)
        reading.hand("load_in_8bit", eight)
        return
    if kind not in ("lora", "qlora"):
        reading.stop("adapter", f"{show(kind)} is not supported; adapters are lora and qlora")
        return
    if kind == "qlora" and not four:
        reading.changes("load_in_4bit", "qlora without it: the base is held in model.dtype")
    reading.hand("load_in_4bit", four)
    reading.hand("load_in_8bit", eight)
    if four:
        # Axolotl always quantises the scales, too
        reading.hand("use_bnb_nested_quant", True)
    if trained is not None:
        reading.put("model.adapter_name_or_path", str(trained), "lora_model_dir")
        for key in [key for key in file.keys if key.startswith("lora_")]:
            reading.tell(key, f"{file.take(key)}: the trained adapter has its own")
        if four:
            reading.put("model.quantization", "nf4", "load_in_4bit")
            reading.trl["load_in_4bit"] = False
        return
    reading.hand("use_peft", True, "adapter")
    for key in ("lora_r", "lora_alpha"):
        if (value := file.take(key)) is None:
            raise UserError(f"{file.where(key)}: missing, and Axolotl has no default; add it")
        reading.hand(key, value)
    if linear:
        listed = [modules] if isinstance(modules, str) else modules or []
        if extra := [name for name in listed if name in ("lm_head", "embed_tokens")]:
            text = f"{', '.join(extra)} beside lora_target_linear cannot be said here"
            reading.stop("lora_target_modules", text, "list all modules")
        modules = "all-linear"
        reading.tell("lora_target_linear", "-> model.lora.target_modules all-linear")
    if not modules:
        raise UserError(f"{file.where('lora_target_modules')}: missing, and Axolotl has no default; add it")
    reading.hand("lora_target_modules", modules)


def _precision(reading: Reading) -> None:
    take = reading.file.take
    bf16, half = take("bf16", "auto"), take("fp16")
    bf16 = bool(bf16) or bool(take("bfloat16"))
    half = bool(half) or bool(take("float16"))
    take("float32")
    if half and not bf16:
        reading.hand("fp16", True)
    reading.hand("bf16", bf16)
    reading.hand("dtype", "bfloat16" if bf16 else "float16" if half else "float32", "bf16")


def _optimizer(reading: Reading) -> None:
    file = reading.file
    if (rate := file.take("learning_rate")) is None:
        raise UserError(f"{file.where('learning_rate')}: missing, and Axolotl has no default; add it")
    reading.hand("learning_rate", rate)
    if (total := file.take("batch_size")) is not None and "gradient_accumulation_steps" not in file.keys:
        micro = file.keys.get("micro_batch_size", 1)
        accumulation = file.as_whole("batch_size", total) // file.as_whole("micro_batch_size", micro)
        reading.hand("gradient_accumulation_steps", accumulation, "batch_size")
    schedule, ratio = file.take("lr_scheduler", "cosine"), file.take("cosine_min_lr_ratio")
    if schedule in ("rex", "one_cycle"):
        reading.changes("lr_scheduler", f"{schedule} is not supported; cosine takes its place")
        schedule = "cosine"
    if ratio is not None and schedule == "cosine":
        schedule = "cosine_with_min_lr"
        reading.hand("lr_scheduler_kwargs", {"min_lr_rate": ratio}, "cosine_min_lr_ratio")
    reading.hand("lr_scheduler_type", schedule, "lr_scheduler")
    if "warmup_steps" not in file.keys and "warmup_ratio" not in file.keys:
        reading.hand("warmup_ratio", 0.03)
        reading.tell("warmup_ratio", "not given: Axolotl's default, 0.03 of the steps, there at most 100")
    if isinstance(file.keys.get("optimizer"), str) and file.keys["optimizer"].startswith("optimi"):
        reading.changes("optimizer", "optimi_adamw -> adamw")
        file.keys["optimizer"] = "adamw_torch"


def _cadence(reading: Reading) -> None:
    file = reading.file
    epochs = file.number("num_epochs", 1.0)
    if epochs <= 0:
        raise UserError(f"{file.where('num_epochs')}: expected a positive number, got {epochs:g}")
    reading.hand("num_train_epochs", epochs, "num_epochs")
    saves, evals = file.number("saves_per_epoch", 0), file.number("evals_per_epoch", 0)
    save_steps, save = file.number("save_steps", 0), file.take("save_strategy")
    if saves or not (save_steps or save):
        save_steps = 1 / ((saves or 1) * epochs)
        given = f"{saves:g}" if saves else "not given, so 1"
        reading.tell("saves_per_epoch", f"{given} -> train.save_steps {save_steps:g} of all steps")
    at_the_end = save_steps == 1 and file.keys.get("max_steps") != 1
    reading.hand("save_strategy", "epoch" if at_the_end else "steps" if save_steps else save)
    if save_steps and not at_the_end:
        reading.hand("save_steps", _steps(save_steps))
    has_data = {"eval_fraction", "eval_dataset_name"} & set(reading.values.get("data", {}))
    steps, strategy = file.number("eval_steps", 0), file.take("eval_strategy", file.take("evaluation_strategy"))
    if evals:
        # evaluated at the end in any case
        steps = 1 / (evals * epochs) if evals * epochs > 1 else 0
        reading.tell("evals_per_epoch", f"{evals:g} -> train.eval_steps {steps:g} of all steps")
    if has_data:
        reading.hand("eval_strategy", "steps" if steps else strategy or "epoch")
        if steps:
            reading.hand("eval_steps", _steps(steps))
    elif steps or strategy not in (None, "no", False):
        reading.tell("eval_steps", "no effect without val_set_size or test_datasets")


def _steps(steps: float) -> int | float:
    """A share of all steps, or whole steps."""
    return steps if steps < 1 else int(steps)


def _model(reading: Reading) -> None:
    take = reading.file.take
    base, config = reading.file.keys.get("base_model"), take("base_model_config")
    if config not in (None, base):
        reading.stop("base_model_config", "a configuration from elsewhere is not loaded")
    if (tokenizer := take("tokenizer_config")) is not None:
        reading.hand("tokenizer_name_or_path", tokenizer, "tokenizer_config")
    for name, flag in (("flash_attention_2", "flash_attention"), ("sdpa", "sdp_attention")):
        if take(flag):
            reading.hand("attn_implementation", name, flag)
    if take("eager_attention"):
        reading.hand("attn_implementation", "eager", "eager_attention")
    for key in ("overrides_of_model_config", "model_config"):
        _model_config(reading, key, reading.file.mapping(key))
    if "router_aux_loss_coef" not in reading.trl and "router_aux_loss_coef" not in reading.file.keys:
        reading.changes(
            "router_aux_loss_coef",
            "not given: a mixture of experts is balanced by its own coefficient; Axolotl's default is 0.001, which is "
            "loss.router_aux_loss_coef",
        )
    tokens = reading.file.mapping("special_tokens")
    if changed := [name for name, token in tokens.items() if name != "pad_token" and token is not None]:
        reading.changes("special_tokens", f"{', '.join(changed)} stay the tokenizer's own; for others save a tokenizer "
                        "with them and name it in model.tokenizer_name_or_path")  # fmt: skip
    elif tokens:
        reading.tell("special_tokens", "packs hold no padding")
    has_project = reading.file.keys.get("wandb_project")
    used = [name for name in TRACKERS if take(f"use_{name}") or (name == "wandb" and has_project)]
    reading.hand("report_to", used or ["none"], "use_wandb")
    name_run(reading, PROJECTS, NAMES)
    stop_early(reading, "early_stopping_patience")


def _model_config(reading: Reading, key: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name == "router_aux_loss_coef":
            reading.hand("router_aux_loss_coef", value, key)
        elif name == "output_router_logits":
            reading.tell(f"{key}.{name}", "the balance of experts is loss.router_aux_loss_coef")
        else:
            reading.stop(key, f"{name} changes the model")


AXOLOTL = Trainer(
    name="Axolotl",
    marks=MARKS,
    rules=RULES,
    defaults={
        "per_device_train_batch_size": 1,
        "max_length": 512,
        "gradient_checkpointing": False,
        "lora_dropout": 0.0,
        "output_dir": "./model-out",
        "save_total_limit": 4,
    },
    read=read,
    same_names=SAME_NAMES,
)
