"""The keys of ms-swift, and of its Megatron commands."""

from __future__ import annotations

from .rules import Left, Read, Rule, To, each, words
from .transformers_keys import TRANSFORMERS_KEYS

MARKS = words("rlhf_type tuner_type train_type split_dataset_ratio attn_impl val_dataset use_hf")
"""Keys that no other trainer has."""

RULES: dict[str, Rule] = {
    "model": To("model_name_or_path"),
    "model_id_or_path": To("model_name_or_path"),
    "lora_rank": To("lora_r"),
    "modules_to_save": To("lora_modules_to_save"),
    "target_parameters": To("lora_target_parameters"),
    "attn_impl": To("attn_implementation", {"flash_attn": "flash_attention_2"}),
    "moe_aux_loss_coeff": To("router_aux_loss_coef"),
    "lr_warmup_fraction": To("warmup_ratio"),
    "train_iters": To("max_steps"),
    "clip_grad": To("max_grad_norm"),
    "max_epochs": To("num_train_epochs"),
    **each("rlhf_type", Read("dpo, simpo, orpo, cpo and kto are converted")),
    **each(
        "loss_type loss_weights beta label_smoothing simpo_gamma cpo_alpha rpo_alpha ld_alpha loss_scale "
        "desirable_weight undesirable_weight",
        Read("`loss`"),
    ),
    **each(
        "per_device_train_batch_size micro_batch_size gradient_accumulation_steps global_batch_size",
        Read("`packing.pairs_per_step`; 16 pairs where the file is silent"),
    ),
    **each("tuner_type train_type sft_type", Read("`model.lora`; lora, which is its default, and full alone")),
    **each(
        "adapters ref_adapters target_modules target_regex init_weights",
        Read("`model.lora`, `model.adapter_name_or_path`"),
    ),
    **each(
        "quant_method quant_bits bnb_4bit_use_double_quant bnb_4bit_quant_type",
        Read("`model.quantization`; 8 bits are told"),
    ),
    **each("torch_dtype bf16 fp16", Read("`model.dtype`")),
    **each(
        "dataset val_dataset split_dataset_ratio columns system template truncation_strategy dataset_shuffle "
        "train_dataloader_shuffle use_hf interleave_prob",
        Read("`data`; `name:subset#rows` is read"),
    ),
    **each("learning_rate lr min_lr lr_scheduler_type lr_decay_style", Read("`optim`")),
    **each("eval_strategy eval_steps", Read("`train.eval_steps`")),
    "early_stop_interval": Read("`train.early_stopping_patience`"),
    **each("swanlab_project swanlab_exp_name", Read("`train.project`, `train.run_name`")),
    **each("sequence_parallel_size context_parallel_size", Read("`train.context_parallel`")),
    **each("ref_model", Read("`reference.model_name_or_path`")),
    **each(
        "lora_bias lorap_lr_ratio lora_ga_batch_size layers_to_transform lora_dtype use_swift_lora",
        Left("stop", "adapters have one rank, on whole modules, and start as peft's do", ("none", False)),
    ),
    **each(
        "freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters "
        "trainable_parameters_regex freeze_llm",
        Left("stop", "parts of a model cannot be trained alone", ([], 0, 0.0, False)),
    ),
    **each(
        "rope_scaling new_special_tokens custom_register_path external_plugins cached_dataset custom_dataset_info "
        "llamapro_num_new_blocks",
        Left("stop", "models, their tokens and data sets are read as they are", ([],)),
    ),
    **each(
        "use_galore lisa_activated_layers optimizer response_prefix enable_thinking norm_bbox "
        "aligner_lr vit_lr callbacks enable_channel_loss agent_template use_chat_template "
        "max_pixels model_kwargs enable_dft_loss",
        Left("new", "not supported; dropped", (False, 0, True, [])),
    ),
    "streaming": Left("told", "the set is read whole; data.streaming reads one that is larger than the disk"),
    "calculate_KL": Left("stop", "loss_type kto has a divergence, and apo_zero_unpaired has none", (True,)),
    "acc_strategy": Left("told", "a metric alone"),
    **each("padding_free packing group_by_length padding_side packing_length", Left("told", "packs hold no padding")),
    **each(
        "dataset_num_proc load_from_cache_file lazy_tokenize shuffle_buffer_size download_mode "
        "packing_num_proc remove_unused_columns strict val_dataset_shuffle max_completion_length "
        "model_type model_name model_author "
        "add_version create_checkpoint_symlink task_type device_map max_memory safe_serialization max_shard_size "
        "hub_token ignore_args_error load_args swanlab_mode swanlab_token "
        "tuner_backend freeze_vit freeze_aligner vit_gradient_checkpointing temperature max_new_tokens check_model "
        "zero_hpz_partition_size deepspeed_autotp_size template_backend use_ray "
        "bnb_4bit_compute_dtype use_logits_to_keep resume_only_model experts_impl",
        Left("told", "no part in what DPO learns, or decided here"),
    ),
    **each(
        "tensor_model_parallel_size expert_tensor_parallel_size expert_model_parallel_size "
        "pipeline_model_parallel_size sequence_parallel "
        "moe_permute_fusion moe_grouped_gemm moe_shared_expert_overlap "
        "recompute_granularity recompute_method recompute_num_layers finetune cross_entropy_loss_fusion no_save_optim "
        "no_save_rng attention_backend optimizer_cpu_offload use_precision_aware_optimizer optimizer_offload_fraction "
        "load save num_workers no_load_optim no_load_rng",
        Left("told", "how Megatron computes; here FSDP2 shares the weights out"),
    ),
}  # fmt: skip

SAME_NAMES = (TRANSFORMERS_KEYS - set(RULES)) | words(
    "model_revision lora_alpha lora_dropout use_rslora use_dora router_aux_loss_coef max_length discopop_tau "
    "f_divergence_type f_alpha_divergence_coef precompute_ref_log_probs trust_remote_code"
)
"""Keys of TRL that have the same name and meaning."""
