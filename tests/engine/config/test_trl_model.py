"""The model of a TRL file: precision, adapters, quantised weights."""

from __future__ import annotations

import pytest

from engine.errors import UserError

from .convert.recipes import TRL, notes


def test_trained_copies_beside_adapters_are_kept(load):
    config = load(TRL + "use_peft: true\nlora_modules_to_save: [lm_head, embed_tokens]\n")
    assert config.model.lora.modules_to_save == ("lm_head", "embed_tokens")


@pytest.mark.parametrize(
    ("lines", "dtype", "changed"),
    [
        ("bf16: false\n", "float32", set()),
        ("fp16: true\n", "bfloat16", {"fp16"}),
        ("dtype: bfloat16\nbf16: false\n", "bfloat16", {"dtype"}),
        ("dtype: float32\n", "bfloat16", set()),
        ("use_peft: true\ndtype: bfloat16\n", "bfloat16", set()),
    ],
)
def test_precision(convert, load, lines, dtype, changed):
    assert load(TRL + lines).model.dtype == dtype
    assert set(notes(convert(TRL + lines), "new")) == changed


def test_model_init_kwargs_are_read(load):
    config = load(TRL + "model_init_kwargs: {revision: abc, attn_implementation: sdpa}\ntrust_remote_code: true\n")
    assert (config.model.revision, config.model.attention, config.model.trust_remote_code) == ("abc", "sdpa", True)


def test_model_init_kwargs_lose_neither_quantisation_nor_the_balance_of_experts(load):
    four = "quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: true}"
    config = load(TRL + f"use_peft: true\nmodel_init_kwargs: {{router_aux_loss_coef: 0.02, {four}}}\n")
    assert (config.model.quantization, config.loss.router_aux_loss_coef) == ("fp4", 0.02)


@pytest.mark.parametrize("kwarg", ["rope_scaling: {factor: 2}", "subfolder: x", "num_labels: 1"])
def test_model_init_kwargs_that_change_the_model_stop(convert, kwarg):
    with pytest.raises(UserError, match=r"model_init_kwargs: \w+ changes the model, which is trained as it is"):
        convert(TRL + f"model_init_kwargs: {{device_map: auto, {kwarg}}}\n")


def test_adapters_on_stacked_experts(convert, load):
    text = TRL + "use_peft: true\nlora_target_parameters: [mlp.experts.down_proj]\n"
    assert load(text + "lora_dropout: 0\n").model.lora.target_parameters == ("mlp.experts.down_proj",)
    # TRL's default dropout, which peft refuses there, too.
    with pytest.raises(UserError, match=r"model\.lora\.dropout does not work on model\.lora\.target_parameters"):
        load(text)
    unused = notes(convert(text.replace("use_peft: true\n", "")), "same", "told")
    assert "no effect without use_peft" in unused["lora_target_parameters"]


def test_quantization_and_kinds_of_lora(convert, load):
    text = TRL + "use_peft: true\nload_in_4bit: true\nuse_dora: true\nuse_rslora: true\nactivation_offloading: true\n"
    config = load(text)
    assert config.model.quantization == "nf4"
    assert (config.model.lora.use_rslora, config.model.lora.use_dora) == (True, True)
    assert config.train.activation_offload
    assert set(notes(convert(text), "new")) == {"use_bnb_nested_quant"}
    nested = text + "use_bnb_nested_quant: true\nbnb_4bit_quant_type: fp4\n"
    assert load(nested).model.quantization == "fp4"
    assert not notes(convert(nested), "new")
    eight = TRL + "use_peft: true\nload_in_8bit: true\n"
    assert load(eight).model.quantization is None
    assert "change each other's numbers" in notes(convert(eight), "new")["load_in_8bit"]
    full = TRL + "load_in_4bit: true\n"
    assert load(full).model.quantization is None
    assert "only be trained with adapters" in notes(convert(full), "new")["load_in_4bit"]
