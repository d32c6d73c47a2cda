"""A tiny random model of every causal-LM family in transformers, made from its own default config.

Sizes are set wherever a config, or a config inside it, has a field of a known name; ``FIX_UPS`` holds what a family
needs beyond that. Options that packs could get wrong are switched on: windows shorter than the sequences, caps and
multipliers of the logits, dropout, every kind of layer, weights far enough from zero that differences show.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 131
SHORT, LONG = 5, 4096
"""Reach of local attention: shorter than every long sequence of the trial, and longer than any."""
DROPOUT = 0.2

EXPERTS = 4
PICKED = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token")
"""Names of the number of experts that a token goes to."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim"), 32),
    **dict.fromkeys(("hidden_size_global", "adapter_in_dim", "adapter_input_size", "adapter_out_dim"), 32),
    "encoder_hash_byte_group_vocab": 97,
    **dict.fromkeys(("embedding_dim", "lru_width", "backbone_hidden_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "dff", "dim_ff"), 48),
    **dict.fromkeys(("d_inner", "mlp_dim", "shared_intermediate_size", "intermediate_size_mlp", "n_inner"), 48),
    **dict.fromkeys(("dense_intermediate_size", "expert_ffn_hidden_size", "feed_forward_size", "d_ff"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("d_head", "d_kv", "dim_head", "attention_head_size"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(PICKED, 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx"), 128),
    **dict.fromkeys(("max_target_positions", "original_max_position_embeddings"), 128),
    **dict.fromkeys(
        ("index_n_heads", "linear_num_value_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads"), 4
    ),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size", "ssm_state_size", "time_step_rank"), 8),
    "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 4,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
"""Names of fields and the value that they get where a config has them."""

OPTIONAL = ("head_dim", "n_inner", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "num_key_value_heads")
"""Sizes that some configs leave open."""

LOCAL = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "window_size",
    "index_topk",
    "keep_window_size",
    "index_block_size",
    "index_topk_blocks",
)
"""Fields that limit how far attention reaches."""

LOGITS = {
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 5.0),
    **dict.fromkeys(("logits_scaling", "logits_mup_width_multiplier"), 1.7),
    **dict.fromkeys(("logit_scale", "lm_head_multiplier"), 0.6),
}
"""Options of the head, away from their neutral values."""

SWITCHES = {
    **dict.fromkeys(("use_sliding_window", "attention_bias", "mlp_bias", "qkv_bias"), True),
    "max_window_layers": 2,
    "attn_logit_softcapping": 3.0,
    "router_jitter_noise": 0.1,
}
"""Options that are off, or too weak to show, by default."""

_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_compress_ratio": 2,
    "indexer_budget": 8,
}
_SHARED_KEYS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
_PLAIN_ROTARY = {"rope_type": "default", "rope_theta": 1e4}

FIX_UPS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _PLAIN_ROTARY)},
    "dots3_note": {"vision_config": {"mlp_layer_types": ["dense"] * 4}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"topk_method": "greedy"},
    "diffllama": {"attention_dropout": 0.0},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "gemma4_assistant": {"text_config": _SHARED_KEYS},
    "gemma4_unified_assistant": {"text_config": _SHARED_KEYS},
    "gemma3": {"text_config": {"final_logit_softcapping": None}},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 2}, "vision_config": {"architecture": "resnet10t"}},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4": {"text_config": {"head_dim": 256}},
    "gemma4_text": {"num_kv_shared_layers": 2, "head_dim": 256},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds": False, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ...},
}
"""What generic sizes do not settle, by model type; ``...`` leaves a field at its default."""


def model_types() -> list[str]:
    """Every model type that transformers maps to a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, *, reach: int = SHORT, picked: int = 2) -> PretrainedConfig:
    """The default config of a family with small sizes.

    Args:
        reach: what every field of ``LOCAL`` that the config uses is set to.
        picked: how many of ``EXPERTS`` experts a token goes to.
    """
    return _shrunk(CONFIG_MAPPING[model_type], reach, picked, FIX_UPS.get(model_type, {}))


def _shrunk(config_class: type[PretrainedConfig], reach: int, picked: int, fixes: dict[str, Any]) -> PretrainedConfig:
    names = set(inspect.signature(config_class.__init__).parameters)
    names |= set(getattr(config_class, "__dataclass_fields__", {}))
    try:
        default = config_class()
    except Exception:
        # some families have no defaults that fit each other; the class still has a value for most fields
        default = config_class
    known = {name: _value(default, name) for name in names}
    options = {name: SIZES[name] for name in SIZES.keys() & names if _is_size(known[name], name in OPTIONAL)}
    options |= {"is_decoder": True} if hasattr(config_class, "is_decoder") else {}
    options |= {name: value for name, value in (LOGITS | SWITCHES).items() if name in names}
    options |= {name: reach for name in LOCAL if name in names}
    options |= {name: picked for name in PICKED if name in options}
    options |= {name: DROPOUT for name in names if "drop" in name and type(known[name]) is float}
    for index, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        options |= {name: index} if name in names else {}
    for name in config_class.sub_configs:
        kind = type(known[name]) if isinstance(known.get(name), PretrainedConfig) else None
        if default is config_class:
            kind = _named_class(config_class, name)
        if kind is not None:
            options[name] = _shrunk(kind, reach, picked, fixes.get(name, {}))
    if "qk_rope_head_dim" in names:
        # latent attention: every query head has its own key, and the rotary part is the head of the config
        options |= {"num_key_value_heads": options["num_attention_heads"]}
        options.pop("head_dim", None)
    if "layer_types" in names and (kinds := _layer_kinds(config_class, known["layer_types"] or [])):
        options["num_hidden_layers"] = max(4, len(kinds))
        options["layer_types"] = [kinds[i % len(kinds)] for i in range(options["num_hidden_layers"])]
    options |= {name: value for name, value in fixes.items() if not isinstance(value, dict) or name not in options}
    return config_class(**{name: value for name, value in options.items() if value is not ...})


def _named_class(config_class: type[PretrainedConfig], name: str) -> type[PretrainedConfig] | None:
    """The class that a config names for a config inside it."""
    model_type = getattr(getattr(config_class, "sub_configs_defaults", {}).get(name), "model_type", None)
    return CONFIG_MAPPING[model_type] if model_type else None


def _layer_kinds(config_class: type[PretrainedConfig], default: list[str]) -> list[str]:
    """Every kind of layer that the family's code tells apart."""
    module = inspect.getmodule(config_class)
    path = Path(module.__file__)
    source = path.with_name(path.name.replace("configuration", "modeling")).read_text(encoding="utf-8")
    named = [kind for kind in ALLOWED_ATTN_LAYER_TYPES if f'"{kind}"' in source]
    return list(dict.fromkeys([*default, *named]))


def _value(default: Any, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except Exception:
        # a field that may differ between layers says so by raising; its class has the default
        return getattr(type(default), name, None)


def _is_size(value: Any, optional: bool) -> bool:
    return (value is None and optional) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def tiny_model(config: PretrainedConfig) -> nn.Module:
    """A float32 model in evaluation mode with random weights, the same on every call."""
    torch.manual_seed(7)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # of some composites the model that writes is made from a config inside theirs
    inner = next((part for part in vars(config).values() if kind and type(part) is kind.config_class), config)
    build = AutoModelForCausalLM.from_config if inner is config else kind._from_config
    model = build(inner, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.std() < 0.15:
                parameter.normal_(std=0.2)
    return model.eval()
