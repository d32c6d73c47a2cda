"""The keys of Axolotl."""

from __future__ import annotations

from ..trl_keys import FUSED
from .rules import Left, Read, Rule, To, each, words

TRACKERS = ("wandb", "tensorboard", "mlflow", "comet", "trackio")
PROJECTS = "wandb_project mlflow_experiment_name trackio_project_name"
NAMES = "wandb_name mlflow_run_name trackio_run_name"
RULES: dict[str, Rule] = {
    "base_model": To("model_name_or_path"),
    "revision_of_model": To("model_revision"),
    "sequence_len": To("max_length"),
    "micro_batch_size": To("per_device_train_batch_size"),
    "optimizer": To("optim"),
    "dpo_label_smoothing": To("label_smoothing"),
    "dpo_use_weighting": To("use_weighting"),
    "dpo_padding_free": To("padding_free"),
    "gradient_checkpointing": To("gradient_checkpointing", {"offload": True, "offload_disk": True, "unsloth": True}),
    "activation_offloading": To("activation_offloading", {"legacy": True, "disk": True, "hidden_states": True}),
    "rpo_alpha": To("rpo_alpha"),
    "peft_use_dora": To("use_dora"),
    "peft_use_rslora": To("use_rslora"),
    **each("rl dpo_loss_type dpo_loss_weights trl rl_beta dpo_beta orpo_alpha cpo_alpha simpo_gamma", Read("`loss`")),
    **each("kto_desirable_weight kto_undesirable_weight", Read("`loss`, of kto alone")),
    **each("datasets test_datasets val_set_size default_system_message", Read("`data`; one data set")),
    **each("chat_template chat_template_jinja", Read("a Jinja file is `data.chat_template`; other names are told")),
    "excess_length_strategy": Read("told: here long responses are cut"),
    **each("adapter lora_model_dir lora_r lora_alpha lora_target_linear lora_target_modules", Read("`model.lora`")),
    **each("load_in_4bit load_in_8bit", Read("`model.quantization`; 8 bits are told")),
    **each("bf16 bfloat16 fp16 float16 float32", Read("`model.dtype`")),
    **each("learning_rate batch_size lr_scheduler cosine_min_lr_ratio", Read("`optim`, `packing.pairs_per_step`")),
    **each(
        "num_epochs saves_per_epoch evals_per_epoch save_steps save_strategy eval_steps eval_strategy "
        "evaluation_strategy",
        Read("`train`; a number for each epoch is a share of all steps"),
    ),
    "early_stopping_patience": Read("`train.early_stopping_patience`"),
    **each(f"{PROJECTS} {NAMES}", Read("`train.project`, `train.run_name`")),
    **each("base_model_config tokenizer_config special_tokens", Read("`model`; changed tokens are told")),
    **each("overrides_of_model_config model_config", Read("`loss.router_aux_loss_coef`; other keys stop")),
    **each("liger_rope liger_rms_norm liger_glu_activation torch_compile", Read("`model.kernels` liger, compile")),
    **each("context_parallel_size sequence_parallel_degree", Read("`train.context_parallel`")),
    **each("dp_shard_size dp_replicate_size", Read("`train.shards_per_replica`, of several copies")),
    **each("flash_attention sdp_attention eager_attention", Read("`model.attention`")),
    **each(" ".join(f"use_{name}" for name in TRACKERS), Read("`train.report_to`; wandb where it has a project")),
    **each(
        "lora_rank_pattern lora_alpha_pattern lora_exclude_modules peft_layers_to_transform peft_layers_pattern "
        "peft_layer_replication "
        "peft_init_lora_weights peft_trainable_token_indices lora_fan_in_fan_out loraplus_lr_ratio peft",
        Left("stop", "adapters have one rank, on whole modules, and start as peft's do", (False, True)),
    ),
    **each("unfrozen_parameters", Left("stop", "parts of a model cannot be trained alone", ([],))),
    **each("relora lisa_n_layers use_pose", Left("stop", "adapters or layers that change are not supported", (False,))),
    **each("tokens added_tokens_overrides reinit_weights", Left("stop", "weights stay as they are", ([], {}, False))),
    **each("rope_scaling", Left("stop", "the model reads as far as it was made to")),
    **each("fp8 qat model_quantization_config use_onebitllms", Left("stop", "this precision is not here", (False,))),
    **each(
        "neftune_noise_alpha noisy_embedding_alpha embedding_lr embedding_lr_scale lr_groups optim_args "
        "optim_target_modules lr_quadratic_warmup cosine_constant_lr_ratio jagged_restart_steps "
        "max_prompt_len min_sample_len eval_sequence_len curriculum_sampling dataset_exact_deduplication "
        "shuffle_before_merging_datasets dataset_shard_num trainer_cls plugins resize_token_embeddings_to_32x "
        "chat_template_kwargs eot_tokens fix_untrained_tokens scaling_softmax dpo_norm_loss",
        Left("new", "not supported; dropped", (False, [])),
    ),
    **each("sample_packing eval_sample_packing", Left("told", "whole pairs are always packed, without padding")),
    **each(
        "sample_packing_group_size sample_packing_bin_size pad_to_sequence_len pad_to_multiple_of group_by_length "
        "batch_flattening multipack_real_batches",
        Left("told", "packs hold no padding"),
    ),
    **each("shuffle_merged_datasets", Left("told", "a new order is drawn every epoch")),
    **each("train_on_inputs", Left("told", "the loss is over responses, as in TRL")),
    **each(
        "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy is_llama_derived_model is_mistral_derived_model "
        "is_falcon_derived_model is_qwen_derived_model tokenizer_save_jinja_files type_of_model device_map",
        Left("told", "transformers' Auto classes choose"),
    ),
    **each(
        "fsdp_version ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_find_unused_parameters fsdp_final_state_dict_type "
        "tensor_parallel_size heads_k_stride ring_attn_func local_rank world_size",
        Left("told", "several processes are started with torchrun, and share the weights out by FSDP2"),
    ),
    "streaming": Left("told", "the set is read whole; data.streaming reads one that is larger than the disk"),
    **each(
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory skip_prepare_dataset "
        "push_dataset_to_hub hf_use_auth_token num_dataset_shards_to_save is_preprocess",
        Left("told", "tokenisation is one streaming pass"),
    ),
    **each(
        "hub_model_id hub_strategy hub_revision wandb_entity wandb_watch wandb_log_model wandb_run_id wandb_mode "
        "mlflow_tracking_uri comet_project_name save_safetensors save_only_model save_first_step "
        "resume_from_checkpoint auto_resume_from_checkpoints include_tokens_per_second include_tkps profiler_steps "
        "profiler_steps_start gc_steps gc_collect_steps torch_empty_cache_steps tf32 strict eval_table_size "
        "eval_max_new_tokens loss_watchdog_threshold loss_watchdog_patience experimental_skip_move_to_device "
        "low_cpu_mem_usage max_memory gpu_memory_limit lora_on_cpu qlora_sharded_model_loading eval_batch_size "
        "auto_find_batch_size accelerator_config remove_unused_columns seed_everything debug dynamic_checkpoint",
        Left("told", "no part in what is learned"),
    ),
    **each(
        "torch_compile_backend torch_compile_mode dpo_use_liger_kernel liger_layer_norm "
        "liger_fused_linear_cross_entropy",
        Left("told", FUSED),
    ),
    **each(
        "xformers_attention flex_attention sage_attention flash_attn_cross_entropy flash_attn_rms_norm "
        "flash_attn_fuse_mlp flash_attn_fuse_qkv s2_attention lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "lora_embedding_kernel chunked_cross_entropy use_kernels use_scattermoe use_sonicmoe tiled_mlp "
        "unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o gradient_checkpointing_kwargs selective_checkpointing "
        "layer_offloading sdpa_varlen experts_implementation precompute_ref_log_probs_batch",
        Left("told", "how it is computed, which this project decides"),
    ),
}  # fmt: skip

MARKS = words("base_model sequence_len rl dataset_prepared_path lora_target_linear")
"""Keys that no other trainer has."""

SAME_NAMES = words(
    "deepspeed fsdp fsdp_config attn_implementation trust_remote_code gradient_accumulation_steps max_steps "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm warmup_steps warmup_ratio lr_scheduler_kwargs "
    "logging_steps save_total_limit seed output_dir precompute_ref_log_probs lora_dropout "
    "lora_modules_to_save lora_target_parameters "
    "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last "
    "load_best_model_at_end metric_for_best_model greater_is_better router_aux_loss_coef"
)
"""Keys of TRL that have the same name and meaning."""
