"""Published recipes: every key of the run configuration that they give, value by value, read by the real schema."""

from __future__ import annotations

import pytest

from engine.config import build_config, load_config, to_dict
from engine.config.convert import convert_file

from .recipes import FOLDER

LINEAR = ("gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj")
EXPECTED = {
    "axolotl-llama-3-8b-lora.yml": {
        "model.model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "model.attention": "flash",
        "model.lora.r": 32,
        "model.lora.alpha": 16,
        "model.lora.dropout": 0.05,
        "model.lora.target_modules": "all-linear",
        "data.dataset_name": "fozziethebeat/alpaca_messages_2k_dpo_test",
        "data.format": "messages",
        "data.columns": {"messages": "conversation"},
        "data.eval_fraction": 0.05,
        "data.max_length": 4096,
        "packing.pairs_per_step": 8,
        "optim.optimizer": "adamw_8bit",
        "optim.learning_rate": 2e-4,
        "optim.lr_scheduler_type": "cosine",
        "optim.warmup_steps": 0.1,
        "train.output_dir": "./outputs/lora-out",
        "train.num_train_epochs": 4,
        "train.save_steps": 0.25,
        "train.save_total_limit": 4,
        "train.logging_steps": 1,
        "train.eval_steps": 0.0625,
        "train.gradient_checkpointing": True,
        "train.report_to": (),
    },
    "axolotl-mistral-7b-qlora.yml": {
        "model.model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "model.lora.r": 8,
        "model.lora.alpha": 16,
        "model.lora.dropout": 0.2,
        "model.lora.target_modules": LINEAR,
        "model.lora.modules_to_save": ("embed_tokens", "lm_head"),
        "model.quantization": "nf4",
        "data.dataset_name": "olivermolenschot/alpaca_messages_dpo_test",
        "data.format": "messages",
        "data.columns": {"messages": "conversation"},
        "data.eval_fraction": 0.05,
        "data.max_length": 2048,
        "packing.pairs_per_step": 64,
        "packing.tokens_per_pack": 65536,
        "optim.optimizer": "adamw_8bit",
        "optim.learning_rate": 1e-4,
        "optim.lr_scheduler_type": "cosine",
        "optim.warmup_steps": 0.1,
        "train.output_dir": "./outputs/dpo-qlora",
        "train.num_train_epochs": 6,
        "train.save_steps": 1 / 6,
        "train.save_total_limit": 4,
        "train.logging_steps": 1,
        "train.eval_steps": 1 / 24,
        "train.gradient_checkpointing": True,
        "train.report_to": (),
    },
    "llama-factory-llama3-lora.yaml": {
        "model.model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "model.trust_remote_code": True,
        "model.lora.r": 8,
        "model.lora.alpha": 16,
        "model.lora.target_modules": "all-linear",
        "data.dataset_name": "data/dpo_en_demo.json",
        "data.max_rows": 1000,
        "data.max_length": 2048,
        "packing.pairs_per_step": 8,
        "packing.tokens_per_pack": 4096,
        "loss.router_aux_loss_coef": 0,
        "optim.learning_rate": 5e-6,
        "optim.lr_scheduler_type": "cosine",
        "optim.warmup_steps": 0.1,
        "train.output_dir": "saves/llama3-8b/lora/dpo",
        "train.num_train_epochs": 3,
        "train.gradient_checkpointing": True,
        "train.report_to": (),
    },
    "ms-swift-qwen2.5-7b-lora.sh": {
        "model.model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "model.lora.r": 8,
        "model.lora.alpha": 32,
        "model.lora.dropout": 0.05,
        "model.lora.target_modules": "all-linear",
        "data.dataset_name": "hjh0119/shareAI-Llama3-DPO-zh-en-emoji",
        "data.eval_fraction": 0.01,
        "data.max_length": 2048,
        "packing.pairs_per_step": 16,
        "packing.tokens_per_pack": 4096,
        "loss.rpo_alpha": 0.1,
        "loss.router_aux_loss_coef": 0,
        "optim.learning_rate": 1e-4,
        "optim.lr_scheduler_type": "cosine",
        "optim.warmup_steps": 0.05,
        "optim.weight_decay": 0.1,
        "optim.adam_beta2": 0.95,
        "train.output_dir": "output",
        "train.num_train_epochs": 1,
        "train.save_steps": 50,
        "train.save_total_limit": 2,
        "train.logging_steps": 5,
        "train.eval_steps": 50,
        "train.gradient_checkpointing": True,
    },
    "ms-swift-qwen3-30b-a3b-megatron.sh": {
        "model.model_name_or_path": "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "data.dataset_name": "AI-ModelScope/orpo-dpo-mix-40k",
        "data.eval_fraction": 0.01,
        "data.max_length": 8192,
        "packing.pairs_per_step": 4,
        "packing.tokens_per_pack": 16384,
        "loss.rpo_alpha": 0.1,
        "loss.router_aux_loss_coef": 1e-3,
        "optim.learning_rate": 1e-5,
        "optim.lr_scheduler_type": "cosine_with_min_lr",
        "optim.lr_scheduler_kwargs": {"min_lr": 1e-6},
        "optim.warmup_steps": 0.05,
        "optim.weight_decay": 0.1,
        "optim.adam_beta2": 0.95,
        "train.output_dir": "megatron_output/Qwen3-30B-A3B-Instruct-2507",
        "train.num_train_epochs": 1,
        "train.save_steps": 200,
        "train.logging_steps": 5,
        "train.eval_steps": 200,
        "train.gradient_checkpointing": True,
    },
    "trl-qwen2-script.py": {
        "model.model_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
        "model.lora.r": 32,
        "model.lora.alpha": 16,
        "model.lora.target_modules": ("q_proj", "v_proj"),
        "data.dataset_name": "trl-lib/ultrafeedback_binarized",
        "data.eval_dataset_name": "trl-lib/ultrafeedback_binarized",
        "packing.pairs_per_step": 16,
        "packing.tokens_per_pack": 4096,
        "loss.beta": 0.05,
        "optim.learning_rate": 5e-6,
        "optim.warmup_steps": 0.1,
        "train.output_dir": "Qwen2-0.5B-DPO",
        "train.num_train_epochs": 1,
        "train.logging_steps": 25,
        "train.eval_steps": 50,
        "train.gradient_checkpointing": True,
        "train.report_to": (),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_is_converted_value_by_value(name, tmp_path):
    """Keys that are not listed are at their defaults."""
    path = tmp_path / "run.yaml"
    path.write_text(convert_file(FOLDER / name).to_yaml())
    sections: dict = {}
    for key, value in EXPECTED[name].items():
        *parents, leaf = key.split(".")
        inside = sections
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[leaf] = value
    assert to_dict(load_config(path)) == to_dict(build_config(sections, name))
