"""Conversion of TRL files: the meaning is kept, and every key that is dropped or changed is explained by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from engine.config import load_config
from engine.config.schema import LoraConfig
from engine.config.trl_keys import COMPARED, CONVERTED, NEW_RESULT, SAME_RESULT, STOPS
from engine.errors import UserError

from .convert.recipes import TRL, assert_stops, notes

REALISTIC = """
# accelerate launch trl dpo --config this.yaml
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
torch_dtype: bfloat16
attn_implementation: flash_attention_2
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5e-6
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_ratio: 0.1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
num_train_epochs: 1
max_steps: 1000
logging_steps: 25
eval_strategy: steps
eval_steps: 50
save_steps: 0.1
output_dir: Qwen2.5-0.5B-DPO
no_remove_unused_columns: true
max_length: 2048
max_prompt_length: 512
rpo_alpha: 1.0
padding_free: true
label_smoothing: 0.1
beta: 0.05
loss_type: sigmoid
bf16: true
precompute_ref_log_probs: true
report_to: [wandb, tensorboard]
push_to_hub: true
hub_model_id: me/model
deepspeed: ds.json
optim: paged_adamw_8bit
weight_decay: 0.01
seed: 7
"""


def test_a_realistic_file_keeps_its_meaning(load):
    config = load(REALISTIC)
    assert config.model.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.model.dtype == "bfloat16"
    assert config.model.attention == "flash"
    assert config.model.lora == LoraConfig(r=32, alpha=16, dropout=0.05, target_modules=("q_proj", "v_proj"))
    assert config.data.max_length == 2048
    assert (config.data.eval_dataset_name, config.data.eval_dataset_split) == (
        "trl-lib/ultrafeedback_binarized",
        "test",
    )
    assert config.packing.pairs_per_step == 16
    assert config.packing.tokens_per_pack == 2 * 2 * 2048
    assert (config.loss.loss_type, config.loss.beta, config.loss.label_smoothing) == ("sigmoid", 0.05, 0.0)
    assert config.optim.learning_rate == 5e-6
    assert config.optim.optimizer == "paged_adamw_8bit"
    assert config.optim.weight_decay == 0.01
    assert config.optim.lr_scheduler_type == "cosine_with_min_lr"
    assert config.optim.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert config.optim.num_warmup_steps(1000) == 100
    assert config.reference.mode == "auto"
    train = config.train
    assert (train.num_train_epochs, train.max_steps, train.seed) == (1, 1000, 7)
    assert (train.logging_steps, train.eval_steps, train.save_steps) == (25, 50, 0.1)
    assert train.gradient_checkpointing
    assert train.report_to == ("tensorboard", "wandb")


def test_a_realistic_file_explains_what_it_drops_and_changes(convert):
    conversion = convert(REALISTIC)
    changed, same = notes(conversion, "new"), notes(conversion, "same", "told")
    assert set(changed) == {"no_remove_unused_columns", "max_prompt_length", "rpo_alpha", "num_processes"}
    assert "deepspeed mean several" in changed["num_processes"]
    assert "num_processes" not in notes(convert(REALISTIC, num_processes=4), "new")
    assert "did you mean remove_unused_columns?" in changed["no_remove_unused_columns"]
    assert "removed from TRL" in changed["max_prompt_length"]
    assert "every response counts alike" in changed["rpo_alpha"]
    assert "TRL ignores it for sigmoid" in same["label_smoothing"]
    assert "pairs_per_step 16" in same["per_device_train_batch_size"]
    assert "packs hold no padding" in same["padding_free"]
    assert "torchrun" in same["deepspeed"]
    mentioned = set(changed) | set(same)
    kept_as_it_is = set(yaml.safe_load(REALISTIC)) - mentioned
    converted = convert(REALISTIC).values
    for key in kept_as_it_is - {"torch_dtype", "gradient_accumulation_steps"}:
        assert any(key in section for section in converted.values()), key
    text = conversion.to_yaml()
    assert text.startswith("# Converted from ")
    assert "#   max_prompt_length: removed from TRL" in text


def test_trls_defaults_count_where_they_are_not_ours(load):
    config = load(TRL)
    assert config.packing.pairs_per_step == 8
    assert config.packing.tokens_per_pack == 8 * 2 * 1024
    assert config.train.num_train_epochs == 3
    assert config.train.gradient_checkpointing
    assert config.train.report_to == ()
    assert config.model.dtype == "bfloat16"
    assert config.data.eval_dataset_name is None
    assert load(TRL + "use_peft: true\n").model.lora == LoraConfig(dropout=0.05, target_modules=None)


@pytest.mark.parametrize(("listed", "given", "pairs"), [("", 4, 64), ("num_processes: 2\n", None, 32), ("", None, 16)])
def test_processes_multiply_the_batch(load, listed, given, pairs):
    text = TRL + "per_device_train_batch_size: 4\ngradient_accumulation_steps: 4\n" + listed
    assert load(text, num_processes=given).packing.pairs_per_step == pairs


@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.1), ("exo_pair", 0.1), ("aot", 0.1)]
)
def test_label_smoothing_is_kept_only_where_trl_reads_it(load, loss_type, smoothing):
    config = load(TRL + f"loss_type: [{loss_type}]\nlabel_smoothing: 0.1\n")
    assert (config.loss.loss_type, config.loss.label_smoothing) == (loss_type, smoothing)


def test_label_smoothing_that_would_turn_sigmoid_into_cdpo_is_said(convert):
    conversion = convert(TRL + "loss_type: [sigmoid, robust]\nlabel_smoothing: 0.1\n")
    assert "conservative DPO" in notes(conversion, "new")["label_smoothing"]


def test_the_weight_of_the_balance_of_experts_is_kept(convert, load):
    text = TRL + "router_aux_loss_coef: 0.02\n"
    assert load(text).loss.router_aux_loss_coef == 0.02
    assert "whole steps" in notes(convert(text), "new")["router_aux_loss_coef"]
    assert load(TRL).loss.router_aux_loss_coef is None


def test_a_reference_that_moves_is_kept(load, convert):
    moves = TRL + "sync_ref_model: true\nref_model_sync_steps: 64\n"
    reference = load(moves).reference
    assert (reference.mode, reference.sync_ref_model, reference.ref_model_sync_steps) == ("live", True, 64)
    assert reference.ref_model_mixup_alpha == 0.6
    assert load(TRL + "ref_model_sync_steps: 64\n").reference.mode == "auto"
    for text, part in (
        ("precompute_ref_log_probs: true\n", "TRL refuses it beside precompute_ref_log_probs"),
        ("use_peft: true\n", "sync_ref_model needs a second model"),
    ):
        with pytest.raises(UserError, match=part):
            convert(moves + text)


def test_added_losses_keep_their_weights(load):
    config = load(TRL + "loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1]\n")
    assert config.loss.loss_type == ("sigmoid", "bco_pair", "sft")
    assert config.loss.loss_weights == (0.8, 0.2, 1.0)


def test_required_keys_may_come_from_the_command_line(convert, tmp_path):
    conversion = convert("dataset_name: d\n")
    assert "--model.model_name_or_path VALUE" in notes(conversion, "missing")["model_name_or_path"]
    assert "model_name_or_path" not in notes(conversion, "new")
    assert conversion.report().startswith("These are missing:\n  model_name_or_path: set model.model_name_or")
    (tmp_path / "run.yaml").write_text(conversion.to_yaml())
    assert load_config(tmp_path / "run.yaml", ["--model.model_name_or_path", "m"]).model.model_name_or_path == "m"


@pytest.mark.parametrize(("key", "value"), [(k, v[0][0]) for k, v in NEW_RESULT.items() if v[0]])
def test_keys_at_their_harmless_value_change_nothing(convert, key, value):
    conversion = convert(TRL + yaml.safe_dump({key: value}))
    assert not notes(conversion, "new")


@pytest.mark.parametrize("key", [k for k in NEW_RESULT if k != "loss_weights"])
def test_keys_that_change_the_result_say_so(convert, key):
    value = 0.5 if key not in ("disable_dropout",) else False
    assert notes(convert(TRL + yaml.safe_dump({key: value})), "new")[key]


def test_every_field_of_trl_is_known():
    trl = pytest.importorskip("trl")
    from trl.scripts.utils import DatasetMixtureConfig

    classes = (trl.ScriptArguments, trl.ModelConfig, trl.DPOConfig, trl.KTOConfig, DatasetMixtureConfig)
    fields = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert not fields - CONVERTED - set(SAME_RESULT) - set(NEW_RESULT) - set(STOPS)
    assert not set(SAME_RESULT) & set(NEW_RESULT)
    assert not CONVERTED & set(SAME_RESULT)


def test_an_unknown_key_is_dropped_and_explained(convert):
    changed = notes(convert(TRL + "learnin_rate: 1.0e-6\nzzz: 1\n"), "new")
    assert changed["learnin_rate"] == "not a key of TRL 1.16; dropped (did you mean learning_rate?)"
    assert changed["zzz"] == "not a key of TRL 1.16; dropped"


@pytest.mark.parametrize(("key", "value"), [("max_lenght", "4096"), ("lora_rr", "8"), ("datasett_name", "d")])
def test_a_misspelt_key_of_what_must_not_be_lost_stops(convert, key, value):
    with pytest.raises(UserError, match=rf"line 3: {key}: not a key of TRL 1.16; did you mean "):
        convert(TRL + f"{key}: {value}\n")


def test_the_result_is_called_the_same_only_where_a_test_compares_it(convert):
    root = Path(__file__).parents[3]
    for key, test in COMPARED.items():
        file, _, name = test.partition(": ")
        assert f"def {name}(" in (root / file).read_text(), key
    report = convert(TRL + "padding_free: true\npush_to_hub: true\nmax_prompt_length: 5\n").report()
    told = {
        title.split(",")[0]: part for title, _, part in (p.partition(":") for p in re.split(r"\n(?=[A-Z])", report))
    }
    assert "padding_free" in told["The result stays the same"]
    assert "push_to_hub" in told["These were read"]
    assert "padding_free" not in told["These were read"]


def test_defaults_are_those_of_trl():
    trl = pytest.importorskip("trl")
    defaults = {f.name: f.default for cls in (trl.ModelConfig, trl.DPOConfig) for f in dataclasses.fields(cls)}
    expected = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3.0, "lora_r": 16,
        "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": None, "gradient_checkpointing": True,
        "learning_rate": 1e-6, "max_length": 1024, "logging_steps": 10, "save_steps": 500, "max_grad_norm": 1.0,
        "beta": 0.1, "bf16": None, "dtype": "float32", "eval_strategy": "no", "report_to": "none", "seed": 42,
        "optim": "adamw_torch_fused", "weight_decay": 0.0, "warmup_steps": 0,
    }  # fmt: skip
    assert {key: defaults[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (TRL + "learning_rate: fast\n", "learning_rate: expected a number"),
        (TRL + "per_device_train_batch_size: 0\n", "per_device_train_batch_size: expected a positive integer"),
        (TRL + "use_peft: 'yes'\n", "use_peft: expected true or false"),
        (TRL + "loss_type: sigmod\n", "did you mean sigmoid?"),
        (TRL + "lr_scheduler_kwargs: '{'\n", "lr_scheduler_kwargs: expected a mapping or JSON"),
        (TRL + "datasets: 3\n", "datasets: expected a list of mappings"),
        ("model: {model_name_or_path: m}\n", "nothing to convert"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_values_that_trl_would_refuse_are_refused(convert, text, part):
    assert_stops(convert, text, part, "trl.yaml")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("adamw_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("rmsprop", "rmsprop"),
    ],
)
def test_optimizers_that_are_here_are_kept(theirs, ours, convert, load):
    text = TRL + f"optim: {theirs}\n"
    assert load(text).optim.optimizer == ours
    assert "optim" not in notes(convert(text), "new")


def test_an_optimizer_that_is_not_here_is_named(convert):
    assert "adafactor is not supported" in notes(convert(TRL + "optim: adafactor\n"), "new")["optim"]
