"""What becomes of the keys of a TRL 1.16 DPO or KTO file that have no counterpart here, and why.

Keys with a counterpart are in ``from_trl.py``. Together the two know every field of TRL's ScriptArguments,
DatasetMixtureConfig, ModelConfig, DPOConfig and KTOConfig, and keys that earlier versions had.
"""

from __future__ import annotations

from typing import Any

FUSED = (
    "the loss and its product are fused here, never by Liger; model.kernels gives blocks Liger's layers or compiles "
    "them, and is auto, either of them on CUDA"
)
"""Of keys that choose kernels."""
SAME_RESULT: dict[str, str] = {}
"""Dropped keys that do not change what is learned."""


def _same(reason: str, keys: str) -> None:
    SAME_RESULT.update(dict.fromkeys(keys.split(), reason))


_same(
    "packs hold no padding",
    "padding_free pad_to_multiple_of pad_token padding_value label_pad_token_id group_by_length length_column_name",
)
_same("tokenisation is one streaming pass", "dataset_num_proc")
_same(
    "the set is read whole; data.streaming reads one that is larger than the disk",
    "dataset_streaming streaming",
)
_same("columns that are not needed are ignored", "remove_unused_columns label_names columns")
_same(
    "packs are built in the background of each step",
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order accelerator_config",
)
_same(
    "evaluation and reference passes use packs of packing.tokens_per_pack",
    "per_device_eval_batch_size precompute_ref_batch_size precompute_ref_eval_batch_size eval_accumulation_steps "
    "eval_do_concat_batches eval_use_gather_object batch_eval_metrics prediction_loss_only include_for_metrics",
)
_same("evaluation computes as training does", "bf16_full_eval fp16_full_eval")
_same("evaluations come every train.eval_steps", "eval_on_start eval_delay do_eval do_predict")
_same("`dpo train` trains", "do_train")
_same(
    "the output layer and the loss are always fused, so the logits never exist",
    "use_logits_to_keep use_num_logits_to_keep",
)
_same(
    "a cost in time or memory, not in the result; set packing.tokens_per_pack to fit the memory",
    "auto_find_batch_size torch_empty_cache_steps activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing_kwargs use_cache skip_memory_metrics tf32",
)
_same(
    FUSED,
    "liger_kernel_config torch_compile_backend torch_compile_mode",
)
_same("runs are deterministic as they are", "full_determinism")
_same("the device is found when the run starts", "use_cpu no_cuda use_mps_device")
_same(
    "several processes are started with torchrun, and share the weights out by FSDP2",
    "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed parallelism_config local_rank "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
    "ignore_bias_buffers average_tokens_across_devices num_machines machine_rank main_process_ip main_process_port "
    "mixed_precision gpu_ids config_file multi_gpu use_fsdp use_deepspeed rdzv_backend",
)
_same(
    "metrics.jsonl has every interval, and progress is one line for each",
    "logging_first_step logging_dir logging_nan_inf_filter log_level log_level_replica log_on_each_node disable_tqdm "
    "include_num_input_tokens_seen include_tokens_per_second trackio_space_id trackio_bucket_id "
    "trackio_static_space_id debug",
)
_same(
    "checkpoints always hold what an exact resume needs, as safetensors",
    "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint ignore_data_skip overwrite_output_dir "
    "restore_callback_states_from_checkpoint",
)
_same("resume with `dpo train FILE --resume`", "resume_from_checkpoint")
_same(
    "upload the output folder with `dpo push`",
    "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision push_to_hub_token "
    "push_to_hub_model_id push_to_hub_organization",
)
_same("set it in the shell", "env")
_same("TRL's DPO does not read it", "label_smoothing_factor lora_task_type")
_same("removed from TRL; evaluation here generates no text", "generate_during_eval")
_same(
    "removed from TRL; adapters need no names, and switched off they are the reference",
    "model_adapter_name ref_adapter_name base_model_attribute_name force_use_ref_model",
)
_same("removed from TRL; causal language models only", "is_encoder_decoder max_target_length")
_same("removed from TRL; give tools in the messages or in a Jinja file for data.chat_template", "tools")

NEW_RESULT: dict[str, tuple[tuple[Any, ...], str]] = {
    "disable_dropout": ((True,), "dropout in the model is always off; it would make policy and reference differ"),
    "loss_weights": (
        (None,),
        "read beside several loss_type; one weight of one loss is none: scale optim.learning_rate instead",
    ),
    "reference_free": ((False,), "removed from TRL; losses without a reference are simpo, orpo and cpo"),
    "max_prompt_length": ((None,), "removed from TRL; only data.max_length cuts, from the end of the response"),
    "max_completion_length": ((None,), "removed from TRL; only data.max_length cuts, from the end of the response"),
    "ref_model_init_kwargs": ((None, {}), "removed from TRL; the reference loads as the model does"),
    "neftune_noise_alpha": ((None,), "noise in the embeddings is not supported"),
    "optim_args": ((None, ""), "optimizer options are keys of optim, such as optim.adam_beta2"),
    "optim_target_modules": ((None,), "low-rank gradient optimizers are not supported"),
    "dataloader_drop_last": ((False,), "the last step of an epoch takes the pairs that are left"),
    "data_seed": ((None,), "train.seed alone orders the data"),
    "load_in_8bit": (
        (False,),
        "LLM.int8 lets the tokens of a pack change each other's numbers; the base is held in model.dtype, "
        "model.quantization nf4 takes less memory",
    ),
}
"""Dropped keys that change the result unless they have one of the harmless values: ``(harmless, reason)``."""

STOPS: dict[str, tuple[tuple[Any, ...], str]] = {
    "data_files": ((None, []), "TRL itself takes files of a set in datasets alone; name the file in dataset_name"),
}
"""Keys without which something else would be trained: nothing is converted unless they have a harmless value."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRECIOUS = _words(
    "model_name_or_path model_revision dtype torch_dtype load_in_4bit use_peft lora_r lora_alpha lora_target_modules "
    "lora_modules_to_save lora_target_parameters use_rslora use_dora datasets dataset_name dataset_config "
    "dataset_train_split max_length "
    "router_aux_loss_coef desirable_weight undesirable_weight"
)
"""Keys that a misspelt key near them stops for: model, dtype, adapters, data, length, balance of experts and
of labels."""

COMPARED = (
    dict.fromkeys(
        _words("max_length padding_free precompute_ref_log_probs"),
        "tests/parity/test_trl_trajectory.py: test_twenty_steps_equal_trl",
    )
    | dict.fromkeys(
        _words(
            "per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing use_peft lora_r lora_alpha "
            "lora_target_modules"
        ),
        "tests/parity/test_trl_variants.py: test_twenty_steps_equal_trl",
    )
    | dict.fromkeys(
        _words("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"),
        "tests/parity/test_trl_variants.py: test_a_reference_that_moves_equals_trl",
    )
    | dict.fromkeys(
        _words("desirable_weight undesirable_weight"),
        "tests/parity/test_trl_kto.py: test_twenty_steps_of_dpo_train_equal_trl",
    )
)
"""Keys whose meaning here a test compares with a run of TRL."""

LOSS_OPTIONS = (
    *("beta", "discopop_tau", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting"),
    *("rpo_alpha", "router_aux_loss_coef", "desirable_weight", "undesirable_weight"),
)
"""Keys of the loss that have the same name and meaning here."""
RPO_ALPHA = (
    "removed from TRL, which took the mean over the tokens of all chosen responses; here every response counts alike, "
    "as in the paper"
)

CONVERTED: set[str] = set()
"""Keys that have a counterpart here."""


def _converted(keys: str) -> None:
    CONVERTED.update(keys.split())


_converted(
    "model_name_or_path tokenizer_name_or_path model_revision trust_remote_code dtype torch_dtype attn_implementation "
    "model_init_kwargs fp16 bf16 use_peft lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora "
    "load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage"
)
_converted(
    "datasets dataset_name dataset_config dataset_train_split dataset_test_split max_length truncation_mode "
    "per_device_train_batch_size gradient_accumulation_steps num_processes accelerate_config train_sampling_strategy"
)
_converted("use_liger_kernel torch_compile")
_converted("loss_type loss_weights label_smoothing precompute_ref_log_probs")
_converted(" ".join(LOSS_OPTIONS))
_converted("lora_modules_to_save lora_target_parameters sync_ref_model ref_model_mixup_alpha ref_model_sync_steps")
_converted(
    "optim learning_rate lr_scheduler_type lr_scheduler_kwargs weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm warmup_steps warmup_ratio"
)
_converted("load_best_model_at_end metric_for_best_model greater_is_better run_name project test_split_size")
_converted(
    "output_dir seed save_total_limit num_train_epochs max_steps gradient_checkpointing activation_offloading "
    "report_to logging_strategy logging_steps save_strategy save_steps eval_strategy evaluation_strategy eval_steps"
)

ADAMW = {
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_hf", "adamw_apex_fused",
}  # fmt: skip
"""Names of ``optim`` that mean the same optimizer."""
