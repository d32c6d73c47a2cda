"""The keys of transformers' TrainingArguments, and its defaults where they are not TRL's."""

from __future__ import annotations

from ..trl_keys import CONVERTED, NEW_RESULT, SAME_RESULT, STOPS
from .rules import words

TRL_KEYS = frozenset({*CONVERTED, *SAME_RESULT, *NEW_RESULT, *STOPS})
"""Every key of TRL that is known."""

TRL_ALONE = words(
    "accelerate_config attn_implementation base_model_attribute_name beta bnb_4bit_quant_storage bnb_4bit_quant_type "
    "columns dataset_config dataset_name dataset_num_proc dataset_streaming dataset_test_split dataset_train_split "
    "datasets disable_dropout discopop_tau dtype env f_alpha_divergence_coef f_divergence_type force_use_ref_model "
    "generate_during_eval ignore_bias_buffers is_encoder_decoder label_pad_token_id label_smoothing ld_alpha "
    "load_in_4bit load_in_8bit lora_alpha lora_dropout lora_modules_to_save lora_r lora_target_modules "
    "lora_target_parameters lora_task_type loss_type loss_weights max_completion_length max_length max_prompt_length "
    "max_target_length model_adapter_name model_init_kwargs model_name_or_path model_revision pad_to_multiple_of "
    "pad_token padding_free padding_value precompute_ref_batch_size precompute_ref_eval_batch_size "
    "precompute_ref_log_probs ref_adapter_name ref_model_init_kwargs ref_model_mixup_alpha ref_model_sync_steps "
    "reference_free router_aux_loss_coef rpo_alpha streaming sync_ref_model test_split_size tokenizer_name_or_path "
    "tools torch_dtype truncation_mode trust_remote_code use_bnb_nested_quant use_dora use_logits_to_keep "
    "use_num_logits_to_keep use_peft use_rslora use_weighting activation_offloading "
    "desirable_weight undesirable_weight"
)
"""Keys of TRL's own classes, not of the TrainingArguments that they build on."""

TRANSFORMERS_KEYS = TRL_KEYS - TRL_ALONE

TRANSFORMERS_DEFAULTS = {"learning_rate": 5e-5, "logging_steps": 500, "gradient_checkpointing": False, "bf16": False}
