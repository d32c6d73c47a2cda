"""ms-swift's commands and files."""

from __future__ import annotations

import pytest

from .recipes import assert_stops, convert, notes, written

FILE = "dpo.sh"
MINIMAL = "swift rlhf --rlhf_type dpo --model m --dataset d"


def test_its_defaults_are_written(run):
    lora = {key: value for key, value in run(MINIMAL).items() if key.startswith("model.lora.")}
    assert {key: lora[f"model.lora.{key}"] for key in ("r", "alpha", "dropout", "target_modules")} == {
        "r": 8,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": "all-linear",
    }
    assert run(MINIMAL + " --tuner_type full") == {
        "model.model_name_or_path": "m",
        "data.dataset_name": "d",
        "data.max_length": None,
        "packing.pairs_per_step": 16,
        "loss.router_aux_loss_coef": 0,
        "optim.learning_rate": 1e-5,
        "optim.lr_scheduler_type": "cosine",
        "optim.weight_decay": 0.1,
        "optim.adam_beta2": 0.95,
        "train.output_dir": "output",
        "train.num_train_epochs": 3,
        "train.logging_steps": 5,
        "train.gradient_checkpointing": True,
    }


def test_options_in_yaml(tmp_path):
    text = "rlhf_type: dpo\nmodel: m\ndataset: [d]\ntuner_type: lora\nlora_rank: 4\nmax_length: 2048\n"
    found = written(convert(tmp_path / "swift.yaml", text), tmp_path)
    assert (found["model.lora.r"], found["data.max_length"], found["optim.learning_rate"]) == (4, 2048, 1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--beta 0.3 --label_smoothing 0.1", {"loss.beta": 0.3, "loss.label_smoothing": 0.1}),
        ("--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1",
         {"loss.loss_type": ("sigmoid", "bco_pair", "sft"), "loss.loss_weights": (0.8, 0.2, 1.0)}),
        ("--split_dataset_ratio 0.1 --eval_steps 50 --save_steps 50 --early_stop_interval 3 "
         "--load_best_model_at_end true --metric_for_best_model rewards/accuracies --swanlab_project p "
         "--swanlab_exp_name a",
         {"train.early_stopping_patience": 3, "train.load_best_model_at_end": True, "train.run_name": "a",
          "train.metric_for_best_model": "rewards/accuracies", "train.project": "p"}),
        ("--rpo_alpha 0.1", {"loss.rpo_alpha": 0.1}),
        ("--router_aux_loss_coef 0.001", {"loss.router_aux_loss_coef": 0.001}),
        ("--dataset 'who/what:en' --use_hf true", {"data.dataset_name": "who/what", "data.dataset_config": "en"}),
        ("--columns '{\"ask\": \"query\", \"worse\": \"rejected_response\"}'",
         {"data.columns": {"prompt": "ask", "rejected": "worse"}}),
        ("--per_device_train_batch_size 4", {"packing.pairs_per_step": 16}),
        ("--target_parameters experts.gate_up_proj experts.down_proj --lora_dropout 0",
         {"model.lora.target_parameters": ("experts.gate_up_proj", "experts.down_proj")}),
        ("--target_modules q_proj v_proj --modules_to_save lm_head",
         {"model.lora.target_modules": ("q_proj", "v_proj"), "model.lora.modules_to_save": ("lm_head",)}),
        ("--quant_method bnb --quant_bits 4", {"model.quantization": "nf4"}),
        ("--adapters out --ref_adapters out",
         {"model.adapter_name_or_path": "out", "reference.model_name_or_path": None}),
        ("--adapters out", {"model.adapter_name_or_path": "out", "reference.model_name_or_path": "m"}),
        ("--split_dataset_ratio 0.01", {"data.eval_fraction": 0.01, "train.eval_steps": 500}),
        ("--torch_dtype float32", {"model.dtype": "float32"}),
        ("--attn_impl flash_attn", {"model.attention": "flash"}),
    ],
)  # fmt: skip
def test_options_are_converted(run, options, expected):
    found = run(f"{MINIMAL} {options}")
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(("kind", "loss"), [("simpo", ("simpo", "sft")), ("orpo", "orpo"), ("cpo", "cpo")])
def test_other_losses_on_pairs(run, kind, loss):
    found = run(MINIMAL.replace("rlhf_type dpo", f"rlhf_type {kind}"))
    assert found["loss.loss_type"] == loss
    assert found.get("loss.beta", 0.1) == (2.0 if kind == "simpo" else 0.1)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (MINIMAL.replace("dpo", "grpo"), "line 1: rlhf_type: the string 'grpo' does not train on preferences"),
        (MINIMAL + " --tuner_type adalora", "tuner_type: the string 'adalora' is not supported"),
        (MINIMAL + " --init_weights pissa", "init_weights: pissa is not supported"),
        (MINIMAL + " --freeze_parameters_ratio 0.5", "parts of a model cannot be trained alone"),
        (MINIMAL + " --max_lenght 5", "max_lenght: not a key of ms-swift that is known here; did you mean max_length?"),
        (MINIMAL + " --quant_method gptq --quant_bits 4", "4 bits by gptq are not supported"),
    ],
)
def test_what_would_be_lost_stops(converted, text, part):
    assert_stops(converted, text, part)


def test_what_differs_is_loud(converted):
    changed = notes(converted(MINIMAL + " --per_device_train_batch_size 2 --rpo_alpha 1 --loss_scale all"), "new")
    assert {"rpo_alpha", "loss_scale", "truncation_strategy", "use_hf", "template"} <= set(changed)


def test_several_sets_are_a_mixture(converted):
    text = MINIMAL.replace("--dataset d", "--dataset ./rows.jsonl#20 'who/what:en#500' d")
    assert converted(text).values["data"]["datasets"] == [
        {"name": "./rows.jsonl", "rows": 20}, {"name": "who/what", "config": "en", "rows": 500},
        {"name": "d", "fraction": 1.0},
    ]  # fmt: skip
    weights = converted(f"{text} --interleave_prob 0.2 0.3 0.5").values["data"]["datasets"]
    assert [one["weight"] for one in weights] == [0.2, 0.3, 0.5]
