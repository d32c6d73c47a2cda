"""What the arguments of adapters, models and trainers in a Python script are called by TRL."""

from __future__ import annotations

from typing import Any

PLAIN_ARGUMENTS = {  # transformers' defaults, where the script has its TrainingArguments and not TRL's DPOConfig
    "learning_rate": 5e-5, "gradient_checkpointing": False, "bf16": False, "logging_steps": 500,
}  # fmt: skip
LORA = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora",
    "target_parameters": "lora_target_parameters",
}  # fmt: skip
LORA_DEFAULTS = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
LORA_LEFT: dict[str, tuple[Any, ...] | None] = {
    "task_type": None, "random_state": None, "max_seq_length": None, "use_gradient_checkpointing": None,
    "bias": ("none",), "inference_mode": (False,), "loftq_config": (None, {}), "layers_to_transform": (None,),
    "init_lora_weights": (True,), "fan_in_fan_out": (False,),
}  # fmt: skip
"""Further arguments of adapters, and the values at which they change nothing; None is any."""
MODEL = {"torch_dtype": "dtype", "dtype": "dtype", "attn_implementation": "attn_implementation",
          "revision": "model_revision", "trust_remote_code": "trust_remote_code", "load_in_4bit": "load_in_4bit",
          "load_in_8bit": "load_in_8bit", "router_aux_loss_coef": "router_aux_loss_coef"}  # fmt: skip
MODEL_LEFT = ("device_map", "use_cache", "low_cpu_mem_usage", "token", "use_auth_token", "cache_dir", "max_memory",
               "local_files_only", "max_seq_length", "full_finetuning", "output_router_logits")  # fmt: skip
NAMES = ("run_name", "project")
"""What a run is called, which teaches nothing."""
CONFIG_LEFT = ("use_cache", "pad_token_id", "output_router_logits", "pretraining_tp", "torch_dtype", "_name_or_path")
CHANGES = ("resize_token_embeddings", "add_tokens", "add_special_tokens", "setup_chat_format", "clone_chat_template",
            "requires_grad_", "load_adapter", "add_adapter")  # fmt: skip
"""Methods that change a model or its tokens."""
QUANTIZED = {
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "bnb_4bit_quant_type": "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
}
