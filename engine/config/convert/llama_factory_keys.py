"""The keys of LLaMA-Factory."""

from __future__ import annotations

from .rules import Left, Read, Rule, To, each, words
from .transformers_keys import TRANSFORMERS_KEYS

MARKS = words("stage finetuning_type cutoff_len pref_beta pref_loss lora_target dataset_dir")
"""Keys that no other trainer has."""

RULES: dict[str, Rule] = {
    "cutoff_len": To("max_length"),
    **each("stage", Read("dpo and kto are converted")),
    **each(
        "kto_chosen_weight kto_rejected_weight", Read("`loss.desirable_weight`, `loss.undesirable_weight` of stage kto")
    ),
    **each("pref_loss pref_bco_weight pref_beta dpo_label_smoothing pref_ftx simpo_gamma ld_alpha", Read("`loss`")),
    "moe_aux_loss_coef": Read("`loss.router_aux_loss_coef`, 0 where the file is silent"),
    **each(
        "finetuning_type lora_rank lora_alpha lora_target additional_target adapter_name_or_path create_new_adapter",
        Read("`model.lora`, `model.adapter_name_or_path`; lora and full alone"),
    ),
    **each(
        "quantization_bit quantization_method quantization_type double_quantization",
        Read("`model.quantization`; 8 bits are told"),
    ),
    **each("ref_model ref_model_adapters", Read("`reference.model_name_or_path`")),
    **each("bf16 fp16 pure_bf16", Read("`model.dtype`")),
    **each(
        "dataset dataset_dir eval_dataset val_size max_samples disable_shuffling default_system template mix_strategy "
        "interleave_probs",
        Read("`data`, by what `dataset_info.json` says of the set"),
    ),
    **each("flash_attn", Read("`model.attention`")),
    **each("disable_gradient_checkpointing", Read("`train.gradient_checkpointing`, true where the file is silent")),
    **each("eval_strategy evaluation_strategy", Read("`train.eval_steps`")),
    "early_stopping_steps": Read("`train.early_stopping_patience`"),
    **each("swanlab_project swanlab_run_name", Read("`train.project`, `train.run_name`")),
    **each(
        "loraplus_lr_ratio pissa_init use_llama_pro freeze_trainable_layers freeze_trainable_modules oft_rank",
        Left("stop", "adapters have one rank, on whole modules, and start as peft's do", (False,)),
    ),
    **each(
        "rope_scaling shift_attn mixture_of_depths train_from_scratch resize_vocab add_tokens add_special_tokens "
        "new_special_tokens_config ref_model_quantization_bit fp8 tokenized_path adapter_folder",
        Left("stop", "models and their tokens are trained as they are", (False,)),
    ),
    **each(
        "use_galore use_apollo use_badam use_adam_mini use_muon",
        Left("new", "this optimizer is not supported; optim.optimizer adamw takes its place", (False,)),
    ),
    **each(
        "freeze_language_model use_dft_loss use_asft_loss use_eaft_loss "
        "tool_format enable_thinking preserve_thinking block_diag_attn model_max_length",
        Left("new", "not supported; dropped", (False, True)),
    ),
    **each("train_on_prompt mask_history", Left("told", "the loss is over the last response, as in its DPO")),
    **each("packing neat_packing", Left("told", "whole pairs are always packed, without padding")),
    **each(
        "preprocessing_num_workers preprocessing_batch_size overwrite_cache buffer_size data_shared_file_system",
        Left("told", "tokenisation is one streaming pass"),
    ),
    "enable_liger_kernel": To("use_liger_kernel"),
    **each(
        "use_unsloth use_unsloth_gc use_reentrant_gc upcast_layernorm upcast_lmhead_output "
        "use_v1_kernels low_cpu_mem_usage use_fast_tokenizer split_special_tokens use_kv_cache infer_backend "
        "infer_dtype offload_folder use_kt quantization_device_map",
        Left("told", "how it is computed, which this project decides"),
    ),
    **each(
        "plot_loss compute_accuracy include_effective_tokens_per_second print_param_status cache_dir media_dir "
        "hf_hub_token ms_hub_token om_hub_token use_swanlab swanlab_workspace swanlab_mode swanlab_api_key "
        "freeze_vision_tower freeze_multi_modal_projector image_max_pixels image_min_pixels video_max_pixels "
        "video_min_pixels ignore_pad_token_for_loss eval_on_each_dataset predict_with_generate eval_num_beams "
        "ray_num_workers loraplus_lr_embedding pissa_iter pissa_convert master_addr master_port",
        Left("told", "no part in what DPO learns"),
    ),
}

SAME_NAMES = (TRANSFORMERS_KEYS - set(RULES)) | words(
    "model_name_or_path model_revision trust_remote_code lora_dropout use_rslora use_dora streaming"
)
"""Keys of TRL that have the same name and meaning."""
