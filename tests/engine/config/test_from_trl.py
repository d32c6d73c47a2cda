"""Conversion of TRL files: the meaning is kept, and every key that is dropped or changed is explained by name."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from engine.config import load_config
from engine.config.convert import convert_file as convert_trl
from engine.config.init import write_converted, write_template
from engine.config.schema import LoraConfig
from engine.config.trl_conversion import Conversion
from engine.config.trl_keys import COMPARED, CONVERTED, NEW_RESULT, SAME_RESULT, STOPS
from engine.errors import UserError

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
MINIMAL = "model_name_or_path: m\ndataset_name: d\n"


@pytest.fixture
def convert(tmp_path):
    def run(text: str, **kwargs) -> Conversion:
        (tmp_path / "trl.yaml").write_text(text)
        return convert_trl(tmp_path / "trl.yaml", **kwargs)

    return run


@pytest.fixture
def load(tmp_path, convert):
    """The run configuration that a converted file means, read back from disk."""

    def run(text: str, **kwargs):
        path = tmp_path / "run.yaml"
        path.write_text(convert(text, **kwargs).to_yaml())
        return load_config(path)

    return run


def _notes(conversion: Conversion, effect: str) -> dict[str, str]:
    """Texts by key; "same" has those, too, that no test compares with TRL."""
    effects = ("same", "told") if effect == "same" else (effect,)
    return {note.key: note.text for note in conversion.notes if note.effect in effects}


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
    changed, same = _notes(conversion, "new"), _notes(conversion, "same")
    assert set(changed) == {"no_remove_unused_columns", "max_prompt_length", "rpo_alpha", "num_processes"}
    assert "deepspeed mean several" in changed["num_processes"]
    assert "num_processes" not in _notes(convert(REALISTIC, num_processes=4), "new")
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
    config = load(MINIMAL)
    assert config.packing.pairs_per_step == 8
    assert config.packing.tokens_per_pack == 8 * 2 * 1024
    assert config.train.num_train_epochs == 3
    assert config.train.gradient_checkpointing
    assert config.train.report_to == ()
    assert config.model.dtype == "bfloat16"
    assert config.data.eval_dataset_name is None
    assert load(MINIMAL + "use_peft: true\n").model.lora == LoraConfig(dropout=0.05, target_modules=None)


@pytest.mark.parametrize(("listed", "given", "pairs"), [("", 4, 64), ("num_processes: 2\n", None, 32), ("", None, 16)])
def test_processes_multiply_the_batch(load, listed, given, pairs):
    text = MINIMAL + "per_device_train_batch_size: 4\ngradient_accumulation_steps: 4\n" + listed
    assert load(text, num_processes=given).packing.pairs_per_step == pairs


@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.1), ("exo_pair", 0.1), ("aot", 0.1)]
)
def test_label_smoothing_is_kept_only_where_trl_reads_it(load, loss_type, smoothing):
    config = load(MINIMAL + f"loss_type: [{loss_type}]\nlabel_smoothing: 0.1\n")
    assert (config.loss.loss_type, config.loss.label_smoothing) == (loss_type, smoothing)


def test_label_smoothing_that_would_turn_sigmoid_into_cdpo_is_said(convert):
    conversion = convert(MINIMAL + "loss_type: [sigmoid, robust]\nlabel_smoothing: 0.1\n")
    assert "conservative DPO" in _notes(conversion, "new")["label_smoothing"]


def test_the_weight_of_the_balance_of_experts_is_kept(convert, load):
    text = MINIMAL + "router_aux_loss_coef: 0.02\n"
    assert load(text).loss.router_aux_loss_coef == 0.02
    assert "whole steps" in _notes(convert(text), "new")["router_aux_loss_coef"]
    assert load(MINIMAL).loss.router_aux_loss_coef is None


def test_trained_copies_beside_adapters_are_kept(load):
    config = load(MINIMAL + "use_peft: true\nlora_modules_to_save: [lm_head, embed_tokens]\n")
    assert config.model.lora.modules_to_save == ("lm_head", "embed_tokens")


def test_a_reference_that_moves_is_kept(load, convert):
    moves = MINIMAL + "sync_ref_model: true\nref_model_sync_steps: 64\n"
    reference = load(moves).reference
    assert (reference.mode, reference.sync_ref_model, reference.ref_model_sync_steps) == ("live", True, 64)
    assert reference.ref_model_mixup_alpha == 0.6
    assert load(MINIMAL + "ref_model_sync_steps: 64\n").reference.mode == "auto"
    for text, part in (
        ("precompute_ref_log_probs: true\n", "TRL refuses it beside precompute_ref_log_probs"),
        ("use_peft: true\n", "sync_ref_model needs a second model"),
    ):
        with pytest.raises(UserError, match=part):
            convert(moves + text)


def test_added_losses_keep_their_weights(load):
    config = load(MINIMAL + "loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1]\n")
    assert config.loss.loss_type == ("sigmoid", "bco_pair", "sft")
    assert config.loss.loss_weights == (0.8, 0.2, 1.0)


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
    assert load(MINIMAL + lines).model.dtype == dtype
    assert set(_notes(convert(MINIMAL + lines), "new")) == changed


def test_model_init_kwargs_are_read(load):
    config = load(MINIMAL + "model_init_kwargs: {revision: abc, attn_implementation: sdpa}\ntrust_remote_code: true\n")
    assert (config.model.revision, config.model.attention, config.model.trust_remote_code) == ("abc", "sdpa", True)


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        ("eval_strategy: steps\neval_steps: 20\n", 20),
        ("eval_strategy: steps\nlogging_steps: 7\n", 7),
        ("eval_strategy: epoch\n", None),
        ("eval_strategy: steps\neval_steps: 0.25\nmax_steps: 10\n", 0.25),
    ],
)
def test_evaluation(load, lines, steps):
    config = load(MINIMAL + lines)
    assert config.data.eval_dataset_name == "d"
    assert config.train.eval_steps == steps


def test_no_evaluation_in_every_spelling(load):
    for line in ("eval_strategy: no\n", "eval_strategy: 'no'\n", "eval_steps: 10\n"):
        assert load(MINIMAL + line).data.eval_dataset_name is None


@pytest.mark.parametrize("spelling", ["no", "'no'"])
def test_no_checkpoints_in_every_spelling(convert, load, spelling):
    assert (
        _notes(convert(MINIMAL + f"save_strategy: {spelling}\n"), "same")["save_strategy"]
        == "no -> train.save_steps null"
    )
    assert load(MINIMAL + f"save_strategy: {spelling}\nsave_steps: 5\n").train.save_steps is None


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_other_save_strategies_are_explained(convert, strategy):
    conversion = convert(MINIMAL + f"save_strategy: '{strategy}'\n")
    assert "train.save_steps" in _notes(conversion, "same")["save_strategy"]


def test_required_keys_may_come_from_the_command_line(convert, tmp_path):
    conversion = convert("dataset_name: d\n")
    assert "--model.model_name_or_path VALUE" in _notes(conversion, "missing")["model_name_or_path"]
    assert "model_name_or_path" not in _notes(conversion, "new")
    assert conversion.report().startswith("These are missing:\n  model_name_or_path: set model.model_name_or")
    (tmp_path / "run.yaml").write_text(conversion.to_yaml())
    assert load_config(tmp_path / "run.yaml", ["--model.model_name_or_path", "m"]).model.model_name_or_path == "m"


@pytest.mark.parametrize("name", ["train_dpo.py", "train_dpo"])
def test_a_script_is_told_from_a_file_of_keys(tmp_path, name):
    path = tmp_path / name
    path.write_text("from trl import DPOConfig\n\nargs = DPOConfig(beta=0.2)\n")
    assert convert_trl(path).values["loss"]["beta"] == 0.2


def test_text_without_keys_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("use beta 0.1\n")
    with pytest.raises(UserError, match=r"expected keys such as `learning_rate: 5\.0e-6`, got the string"):
        convert_trl(path)


def test_a_mixture_of_one_is_a_dataset_and_of_two_are_sets(convert):
    one = convert("model_name_or_path: m\ndatasets:\n- {path: p, name: n, split: s}\n")
    assert one.values["data"] == {"dataset_name": "p", "dataset_config": "n", "dataset_train_split": "s"}
    two = convert(
        "model_name_or_path: m\ndatasets:\n- {path: p, split: s}\n- {path: q, name: c}\ntest_split_size: 0.1\n"
    )
    assert two.values["data"] == {
        "datasets": [{"name": "p", "split": "s", "fraction": 1.0}, {"name": "q", "config": "c", "fraction": 1.0}],
        "eval_fraction": 0.1,
    }
    shares = convert("model_name_or_path: m\ndatasets:\n- {path: p, fraction: 0.2}\n- {path: q, fraction: 0.8}\n")
    assert [one["weight"] for one in shares.values["data"]["datasets"]] == [0.2, 0.8]
    files = convert("model_name_or_path: m\ndatasets:\n- {path: p, data_files: x.jsonl}\neval_strategy: steps\n")
    assert files.values["data"]["datasets"] == [{"name": "p", "data_files": ["x.jsonl"], "fraction": 1.0}]
    for split, given, part in (
        (None, "x.jsonl", {}),
        ("train[:50%]", "x.jsonl", {"split": "train[:50%]"}),
        ("test", "y.jsonl", {}),
    ):
        one = {"path": "p", "data_files": {"train": "x.jsonl", "test": "y.jsonl"}, "split": split}
        named = convert(f"model_name_or_path: m\ndatasets:\n- {json.dumps(one)}\neval_strategy: steps\n")
        assert named.values["data"]["datasets"] == [{"name": "p", **part, "data_files": [given], "fraction": 1.0}]
    with pytest.raises(UserError, match="have no split 'dev'; they have train"):
        convert("model_name_or_path: m\ndatasets:\n- {path: p, split: dev, data_files: {train: x.jsonl}}\n")
    assert "none are evaluated" in _notes(files, "new")["eval_strategy"]
    with pytest.raises(UserError, match=r"trl.yaml, line 3: datasets: each set needs a path"):
        convert(MINIMAL + "datasets:\n- {path: p, data_dir: x}\n")


@pytest.mark.parametrize(("key", "value"), [(k, v[0][0]) for k, v in NEW_RESULT.items() if v[0]])
def test_keys_at_their_harmless_value_change_nothing(convert, key, value):
    conversion = convert(MINIMAL + yaml.safe_dump({key: value}))
    assert not _notes(conversion, "new")


@pytest.mark.parametrize("key", [k for k in NEW_RESULT if k != "loss_weights"])
def test_keys_that_change_the_result_say_so(convert, key):
    value = 0.5 if key not in ("disable_dropout",) else False
    assert _notes(convert(MINIMAL + yaml.safe_dump({key: value})), "new")[key]


def test_every_field_of_trl_is_known():
    trl = pytest.importorskip("trl")
    from trl.scripts.utils import DatasetMixtureConfig

    classes = (trl.ScriptArguments, trl.ModelConfig, trl.DPOConfig, DatasetMixtureConfig)
    fields = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert not fields - CONVERTED - set(SAME_RESULT) - set(NEW_RESULT) - set(STOPS)
    assert not set(SAME_RESULT) & set(NEW_RESULT)
    assert not CONVERTED & set(SAME_RESULT)


def test_an_unknown_key_is_dropped_and_explained(convert):
    changed = _notes(convert(MINIMAL + "learnin_rate: 1.0e-6\nzzz: 1\n"), "new")
    assert changed["learnin_rate"] == "not a key of TRL 1.16; dropped (did you mean learning_rate?)"
    assert changed["zzz"] == "not a key of TRL 1.16; dropped"


@pytest.mark.parametrize(("key", "value"), [("max_lenght", "4096"), ("lora_rr", "8"), ("datasett_name", "d")])
def test_a_misspelt_key_of_what_must_not_be_lost_stops(convert, key, value):
    with pytest.raises(UserError, match=rf"line 3: {key}: not a key of TRL 1.16; did you mean "):
        convert(MINIMAL + f"{key}: {value}\n")


def test_adapters_on_single_parameters_stop(convert):
    with pytest.raises(UserError, match="lora_target_parameters: adapters sit on modules"):
        convert(MINIMAL + "use_peft: true\nlora_target_parameters: [w]\n")


def test_the_result_is_called_the_same_only_where_a_test_compares_it(convert):
    root = Path(__file__).parents[3]
    for key, test in COMPARED.items():
        file, _, name = test.partition(": ")
        assert f"def {name}(" in (root / file).read_text(), key
    report = convert(MINIMAL + "padding_free: true\npush_to_hub: true\nmax_prompt_length: 5\n").report()
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
        (MINIMAL + "learning_rate: fast\n", "learning_rate: expected a number"),
        (MINIMAL + "per_device_train_batch_size: 0\n", "per_device_train_batch_size: expected a positive integer"),
        (MINIMAL + "use_peft: 'yes'\n", "use_peft: expected true or false"),
        (MINIMAL + "loss_type: sigmod\n", "did you mean sigmoid?"),
        (MINIMAL + "lr_scheduler_kwargs: '{'\n", "lr_scheduler_kwargs: expected a mapping or JSON"),
        (MINIMAL + "datasets: 3\n", "datasets: expected a list of mappings"),
        ("model: {model_name_or_path: m}\n", "nothing to convert"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_values_that_trl_would_refuse_are_refused(convert, text, part):
    with pytest.raises(UserError) as caught:
        convert(text)
    assert part in str(caught.value)
    assert "trl.yaml" in str(caught.value)


def test_init_refuses_to_overwrite(tmp_path):
    path = tmp_path / "run.yaml"
    write_template(path)
    before = path.read_text()
    with pytest.raises(UserError, match="exists already"):
        write_template(path)
    (tmp_path / "trl.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match="exists already"):
        write_converted(tmp_path / "trl.yaml", path)
    assert path.read_text() == before
    with pytest.raises(UserError, match="does not exist"):
        write_template(tmp_path / "absent" / "run.yaml")


def test_a_missing_file_is_one_of_another_trainer(tmp_path):
    with pytest.raises(UserError, match=r"no such file; give the path of the configuration, command or script"):
        convert_trl(tmp_path / "nope.yaml")


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
    text = MINIMAL + f"optim: {theirs}\n"
    assert load(text).optim.optimizer == ours
    assert "optim" not in _notes(convert(text), "new")


def test_an_optimizer_that_is_not_here_is_named(convert):
    assert "adafactor is not supported" in _notes(convert(MINIMAL + "optim: adafactor\n"), "new")["optim"]


def test_quantization_and_kinds_of_lora(convert, load):
    text = (
        MINIMAL + "use_peft: true\nload_in_4bit: true\nuse_dora: true\nuse_rslora: true\nactivation_offloading: true\n"
    )
    config = load(text)
    assert config.model.quantization == "nf4"
    assert (config.model.lora.use_rslora, config.model.lora.use_dora) == (True, True)
    assert config.train.activation_offload
    assert set(_notes(convert(text), "new")) == {"use_bnb_nested_quant"}
    nested = text + "use_bnb_nested_quant: true\nbnb_4bit_quant_type: fp4\n"
    assert load(nested).model.quantization == "fp4"
    assert not _notes(convert(nested), "new")
    eight = MINIMAL + "use_peft: true\nload_in_8bit: true\n"
    assert load(eight).model.quantization is None
    assert "change each other's numbers" in _notes(convert(eight), "new")["load_in_8bit"]
    full = MINIMAL + "load_in_4bit: true\n"
    assert load(full).model.quantization is None
    assert "only be trained with adapters" in _notes(convert(full), "new")["load_in_4bit"]
