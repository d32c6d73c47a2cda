"""open-instruct: `dpo.py` and `dpo_tune_cache.py`, as a command or its options in a YAML."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from ..fields import show
from .entries import Entry, name_run, put_data
from .processes import read_division, read_kernels
from .reading import Reading, Trainer, as_list
from .rules import Left, Read, Rule, To, each, words

_LOSSES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "simpo": "simpo", "wpo": "sigmoid"}
_TARGETS = ["q_proj", "o_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]

MARKS = words(
    "mixer_list mixer_list_splits dataset_mixer_list dataset_mixer_list_splits max_seq_length use_lora "
    "use_qlora checkpointing_steps with_tracking exp_name use_slow_tokenizer"
)
"""Keys that no other trainer has."""

RULES: dict[str, Rule] = {
    "tokenizer_name": To("tokenizer_name_or_path"),
    "max_seq_length": To("max_length"),
    "num_epochs": To("num_train_epochs"),
    "max_train_steps": To("max_steps"),
    **each("loss_type dpo_loss_type beta dpo_beta gamma_beta_ratio label_smoothing", Read("`loss`")),
    **each("load_balancing_loss load_balancing_weight", Read("`loss.router_aux_loss_coef`, 0 where it is off")),
    **each(
        "dataset_mixer mixer_list dataset_mixer_list mixer_list_splits dataset_mixer_list_splits dataset_name "
        "dataset_config_name max_train_samples",
        Read("`data`; whole numbers are rows, others shares"),
    ),
    **each("use_lora use_qlora lora_rank lora_alpha lora_dropout", Read("`model.lora`, `model.quantization`")),
    **each("optimizer_type use_8bit_optimizer dpo_use_paged_optimizer", Read("`optim.optimizer`")),
    **each("checkpointing_steps keep_last_n_checkpoints", Read("`train.save_steps`, `train.save_total_limit`")),
    **each("with_tracking report_to", Read("`train.report_to`")),
    **each("wandb_project run_name exp_name", Read("`train.project`, `train.run_name`")),
    **each("gradient_checkpointing activation_memory_budget", Read("`train.gradient_checkpointing`")),
    **each("chat_template_name add_bos transform_fn", Read("told: here the tokenizer's template writes a row")),
    **each(
        "config_name rope_scaling_factor rope_scaling_old_context_len additional_model_arguments",
        Left("stop", "models are trained as they are", ({}, "")),
    ),
    **each("optimizer_kwargs config_hash loss_implementation", Left("new", "not supported; dropped", ({}, ""))),
    **each("concatenated_forward packing", Left("told", "whole pairs are always packed, without padding")),
    **each(
        "wandb_entity wandb_group_name push_to_hub hf_entity hf_repo_id "
        "hf_repo_revision hf_repo_url save_to_hub hf_metadata_dataset try_launch_beaker_eval_jobs gs_bucket_path "
        "try_auto_save_to_beaker dataset_mix_dir oe_eval_tasks oe_eval_max_length oe_eval_gpu_multiplier "
        "eval_workspace eval_priority send_slack_alerts resume_from_checkpoint do_not_randomize_output_dir "
        "ephemeral_save_interval",
        Left("told", "what becomes of the model is not learned from"),
    ),
    **each(
        "preprocessing_num_workers overwrite_cache cache_mode local_cache_dir skip_cache cache_dataset_only "
        "target_columns cache_logprobs_only use_slow_tokenizer tokenizer_revision data_loader_seed",
        Left("told", "rows are tokenised in one pass, and reference log-probs are stored by row"),
    ),
    **each("compile_model use_liger_kernel", Read("`model.kernels` compile, liger")),
    **each("context_parallel_degree cp_degree", Read("`train.context_parallel`")),
    **each("fsdp_shard_degree fsdp_num_replicas", Read("`train.shards_per_replica`, of several copies")),
    **each(
        "zero_stage offload_optimizer offload_param zero_hpz_partition_size sync_each_batch timeout profiling "
        "tensor_parallel_degree cp_strategy "
        "fused_optimizer low_cpu_mem_usage use_flash_attn rope_scaling_beta_fast "
        "rope_scaling_beta_slow activation_checkpointing_mode activation_checkpointing_modules",
        Left("told", "how it is computed, which this project decides"),
    ),
}  # fmt: skip


def read(reading: Reading) -> None:
    """The keys that mean something together."""
    _loss(reading)
    _data(reading)
    _adapter(reading)
    _run(reading)
    read_kernels(reading, "use_liger_kernel", "compile_model")
    sizes = {"shards": "fsdp_shard_degree", "copies": "fsdp_num_replicas"}
    read_division(reading, "context_parallel_degree cp_degree", **sizes)
    reading.hand("bf16", True)
    reading.tell("dtype", "bfloat16 over float32 weights, as DeepSpeed keeps them -> model.dtype bfloat16")


def _loss(reading: Reading) -> None:
    file = reading.file
    named, kind = reading.first("loss_type dpo_loss_type", "dpo_norm")
    if not isinstance(kind, str) or kind not in _LOSSES:
        raise UserError(f"{file.where(named)}: {show(kind)} is not a loss; it is one of {', '.join(_LOSSES)}")
    beta = file.number("beta", file.number("dpo_beta", 5.0))
    reading.put("loss.loss_type", _LOSSES[kind], named)
    reading.put("loss.beta", beta, "beta")
    smoothing = file.number("label_smoothing", 0.0)
    if smoothing:
        reading.put("loss.label_smoothing", smoothing, "label_smoothing")
    ratio = file.number("gamma_beta_ratio", 0.3)
    if kind == "simpo":
        reading.put("loss.simpo_gamma", beta * ratio, "gamma_beta_ratio")
    elif kind == "wpo":
        reading.put("loss.use_weighting", True, "loss_type")
        reading.changes("loss_type", "wpo: pairs are weighed as in TRL")
    balanced, weight = file.flag("load_balancing_loss"), file.number("load_balancing_weight", 0.001)
    reading.put("loss.router_aux_loss_coef", weight if balanced else 0.0, "load_balancing_loss")
    reading.changes(
        "transform_fn", "open-instruct counts every assistant turn of a conversation, here the last one alone"
    )


def _data(reading: Reading) -> None:
    file = reading.file
    mixer = file.mapping("dataset_mixer") or None
    listed = file.take("mixer_list", file.take("dataset_mixer_list"))
    splits_name, splits = reading.first("mixer_list_splits dataset_mixer_list_splits", ["train"])
    splits = as_list(reading, splits_name, splits)
    name, config = file.take("dataset_name"), file.take("dataset_config_name")
    key = "dataset_mixer" if mixer is not None else "mixer_list" if listed else "dataset_name"
    if mixer is not None:
        pairs = list(mixer.items())
    elif listed:
        if not isinstance(listed, list) or len(listed) % 2:
            raise UserError(f"{file.where(key)}: expected names and amounts by turns, got {show(listed)}")
        pairs = list(zip(listed[::2], listed[1::2], strict=True))
    else:
        pairs = [(name, 1.0)] if name is not None else []
    if len(splits) not in (1, len(pairs)):
        raise UserError(f"{file.where(splits_name)}: {len(splits)} splits for {len(pairs)} data sets")
    splits = splits * len(pairs) if len(splits) == 1 else splits
    entries = [_entry(reading, key, pair, str(split), config) for pair, split in zip(pairs, splits, strict=True)]
    put_data(reading, key, entries)
    if (most := file.take("max_train_samples")) is not None:
        reading.put("data.max_rows", file.as_whole("max_train_samples", most), "max_train_samples")
        reading.changes("max_train_samples", "the first rows of the file, not of a shuffled mixture")
    template = file.take("chat_template_name")
    if template is not None:
        text = f"{template} is a template of open-instruct; here the tokenizer's own, or a file in data.chat_template"
        reading.changes("chat_template_name", text)
    if file.take("add_bos"):
        reading.changes("add_bos", "the template decides on BOS")
    file.take("transform_fn")


def _entry(reading: Reading, key: str, pair: tuple[Any, Any], split: str, config: Any) -> Entry:
    name, amount = pair
    number = reading.file.as_number(key, amount)
    # As there: a number with a point is a share, and a mixer as a mapping has shares alone.
    is_rows = key != "dataset_mixer" and "." not in str(amount)
    rows, share = (int(number), None) if is_rows else (None, number)
    # Shares of a list are drawn at random there, those of a mapping are the first rows.
    drawn = key != "dataset_mixer"
    return Entry(str(name), None if config is None else str(config), split, fraction=share, drawn=drawn, rows=rows)


def _adapter(reading: Reading) -> None:
    file = reading.file
    used, quantised = file.flag("use_lora"), file.flag("use_qlora")
    rank, alpha, dropout = file.whole("lora_rank", 64), file.number("lora_alpha", 16), file.number("lora_dropout", 0.1)
    if quantised and not used:
        reading.stop("use_qlora", "a quantised model is trained with adapters alone", "set use_lora")
    if used:
        reading.hand("use_peft", True, "use_lora")
        reading.hand("lora_r", rank, "lora_rank")
        reading.hand("lora_alpha", int(alpha))
        reading.hand("lora_dropout", dropout)
        reading.hand("lora_target_modules", _TARGETS)
        reading.hand("load_in_4bit", quantised, "use_qlora")
        reading.hand("use_bnb_nested_quant", quantised)


def _run(reading: Reading) -> None:
    file = reading.file
    kind, eight = file.take("optimizer_type", "adamw"), file.flag("use_8bit_optimizer")
    paged = file.flag("dpo_use_paged_optimizer") or bool(reading.trl.get("load_in_4bit"))
    name = ("paged_adamw_8bit" if eight else "paged_adamw_32bit") if paged else "adamw_torch"
    reading.hand("optim", name, "optimizer_type")
    if kind != "adamw":
        reading.changes("optimizer_type", f"{kind} is not supported; adamw takes its place")
    steps = file.take("checkpointing_steps", 500)
    if str(steps).isdigit():
        reading.hand("save_steps", int(steps), "checkpointing_steps")
    else:
        reading.hand("save_strategy", str(steps), "checkpointing_steps")
    kept = file.take("keep_last_n_checkpoints", 3)
    if isinstance(kept, int) and kept > 0:
        reading.hand("save_total_limit", kept, "keep_last_n_checkpoints")
    trackers = file.take("report_to", "all")
    reading.hand("report_to", trackers if file.flag("with_tracking") else "none", "with_tracking")
    if reading.trl["report_to"] == "all":
        reading.trl["report_to"] = ["wandb"]
    name_run(reading, "wandb_project", "run_name exp_name")
    budget = file.number("activation_memory_budget", 1.0)
    reading.hand("gradient_checkpointing", file.flag("gradient_checkpointing") or budget < 1)


OPEN_INSTRUCT = Trainer(
    name="open-instruct",
    marks=MARKS,
    rules=RULES,
    defaults={
        "learning_rate": 2e-5, "warmup_ratio": 0.1, "max_grad_norm": None, "num_train_epochs": 1, "logging_steps": 1,
        "output_dir": "output/", "max_length": None,
    },
    read=read,
    same_names=words(
        "model_name_or_path model_revision attn_implementation trust_remote_code per_device_train_batch_size "
        "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_ratio weight_decay max_grad_norm seed "
        "logging_steps output_dir num_processes mixed_precision"
    ),
)  # fmt: skip
