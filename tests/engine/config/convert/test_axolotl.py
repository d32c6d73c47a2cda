"""Axolotl's files: every key is converted or told, its defaults are written, and nothing precious is lost."""

from __future__ import annotations

import pytest

from engine.errors import UserError

from .recipes import assert_stops, notes

FILE = "ax.yml"
MINIMAL = "base_model: m\nrl: dpo\nlearning_rate: 1.0e-5\ndatasets:\n- {path: d}\n"
LORA = MINIMAL + "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"


def test_its_defaults_are_written(run):
    assert run(MINIMAL) == {
        "model.model_name_or_path": "m",
        "data.dataset_name": "d",
        "data.max_length": 512,
        "packing.pairs_per_step": 1,
        "packing.tokens_per_pack": 1024,
        "optim.learning_rate": 1e-5,
        "optim.lr_scheduler_type": "cosine",
        "optim.warmup_steps": 0.03,
        "train.output_dir": "./model-out",
        "train.save_total_limit": 4,
        "train.report_to": (),
    }


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("rl_beta: 0.3\n", {"loss.beta": 0.3}),
        ("dpo_beta: 0.3\nrpo_alpha: 0.5\n", {"loss.beta": 0.3, "loss.rpo_alpha": 0.5}),
        ("trl: {beta: 0.3}\n", {"loss.beta": 0.3}),
        ("dpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1, 0.5]\n", {"loss.loss_weights": (1.0, 0.5)}),
        ("dpo_use_weighting: true\n", {"loss.use_weighting": True}),
        ("sequence_len: 2048\n", {"data.max_length": 2048, "packing.tokens_per_pack": 4096}),
        ("batch_size: 16\nmicro_batch_size: 2\n", {"packing.pairs_per_step": 16}),
        ("num_epochs: 4\nsaves_per_epoch: 2\n", {"train.save_steps": 0.125}),
        ("lr_scheduler: cosine\ncosine_min_lr_ratio: 0.1\n", {"optim.lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        (
            "val_set_size: 100\n",
            {"data.dataset_train_split": "train[:-100]", "data.eval_dataset_split": "train[-100:]"},
        ),
        ("bf16: false\n", {"model.dtype": "float32"}),
        ("model_config: {router_aux_loss_coef: 0.02}\n", {"loss.router_aux_loss_coef": 0.02}),
        ("chat_template_jinja: chat.jinja\n", {"data.chat_template": "chat.jinja"}),
        ("flash_attention: true\n", {"model.attention": "flash"}),
        ("wandb_project: mine\nwandb_name: a\n",
         {"train.report_to": ("wandb",), "train.project": "mine", "train.run_name": "a"}),
        ("val_set_size: 0.1\neval_steps: 5\nsave_steps: 10\nearly_stopping_patience: 3\nload_best_model_at_end: true\n"
         "metric_for_best_model: rewards/margins\ngreater_is_better: true\n",
         {"train.early_stopping_patience": 3, "train.load_best_model_at_end": True, "train.save_steps": 10,
          "train.metric_for_best_model": "rewards/margins", "train.greater_is_better": True}),
    ],
)  # fmt: skip
def test_keys_are_converted(run, lines, expected):
    found = run(MINIMAL + lines)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rl: ipo", {"loss.loss_type": "ipo"}),
        ("rl: orpo\norpo_alpha: 0.2", {"loss.loss_type": "orpo", "loss.beta": 0.2}),
        ("rl: simpo\ncpo_alpha: 0\nsimpo_gamma: 1.5", {"loss.loss_type": "simpo", "loss.simpo_gamma": 1.5}),
        ("rl: simpo", {"loss.loss_type": ("simpo", "sft"), "loss.loss_weights": (1.0, 1.0)}),
    ],
)
def test_other_losses_on_pairs(run, kind, expected):
    found = run(MINIMAL.replace("rl: dpo", kind))
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{path: d, type: chatml.intel}", {"data.format": "conversation", "data.columns": {"prompt": "question"}}),
        ("{path: d, type: chatml.argilla}", {"data.columns": {
            "prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}}),
        ("{path: json, ds_type: json, data_files: [rows.jsonl]}", {"data.dataset_name": "rows.jsonl"}),
        ("{path: d, name: c, split: train_prefs}", {
            "data.dataset_config": "c", "data.dataset_train_split": "train_prefs"}),
        ("{path: d, type: {field_prompt: q, field_chosen: good}}", {"data.columns": {"prompt": "q", "chosen": "good"}}),
        ("{path: d, type: chat_template.default, field_messages: conversations, "
         "message_property_mappings: {role: from, content: value}, roles: {user: [human]}}",
         {"data.format": "messages", "data.columns": {"messages": "conversations"},
          "data.turn_fields": {"role": "from", "content": "value"}, "data.roles": {"human": "user"}}),
    ],
)  # fmt: skip
def test_data_sets(run, entry, expected):
    found = run(MINIMAL.replace("{path: d}", entry))
    assert {key: found.get(key) for key in expected} == expected


def test_adapters(run, converted):
    expected = {"model.lora.r": 8, "model.lora.alpha": 16, "model.lora.dropout": 0.0}
    found = run(LORA)
    assert {key: found[key] for key in expected} == expected
    assert found["model.lora.target_modules"] == "all-linear"
    experts = run(LORA + "lora_target_parameters: [mlp.experts.down_proj]\n")
    assert experts["model.lora.target_parameters"] == ("mlp.experts.down_proj",)
    qlora = run(LORA.replace("adapter: lora", "adapter: qlora\nload_in_4bit: true") + "peft_use_dora: true\n")
    assert (qlora["model.quantization"], qlora["model.lora.use_dora"]) == ("nf4", True)
    trained = run(LORA + "lora_model_dir: out/adapter\n")
    assert trained["model.adapter_name_or_path"] == "out/adapter"
    assert not any(key.startswith("model.lora.") for key in trained)
    assert "no effect without adapter" in notes(converted(MINIMAL + "lora_r: 8\n"), "told")["lora_r"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (MINIMAL.replace("rl: dpo", "rl: grpo"), "line 2: rl: the string 'grpo' does not train on preferences"),
        (MINIMAL.replace("rl: dpo\n", "micro_batch_size: 1\n"), "no rl: its data are no preference pairs"),
        (MINIMAL + "adapter: llama-adapter\n", "adapter: the string 'llama-adapter' is not supported"),
        (LORA + "peft_layers_to_transform: [0, 1]\n", "peft_layers_to_transform: adapters have one rank"),
        (LORA.replace("lora_r: 8\n", ""), "lora_r: missing"),
        (MINIMAL + "unfrozen_parameters: [lm_head]\n", "parts of a model cannot be trained alone"),
        (MINIMAL + "sequence_length: 4096\n", "line 6: sequence_length: not a key of Axolotl that is known here; did "
         "you mean sequence_len?"),
        (MINIMAL + "model_config: {rope_theta: 1.0e+6}\n", "model_config: rope_theta changes the model"),
        (MINIMAL + "model_name_or_path: x\n", "has keys of Axolotl (base_model, rl) and of TRL (model_name_or_path)"),
        (MINIMAL.replace("learning_rate: 1.0e-5\n", ""), "learning_rate: missing"),
        (MINIMAL.replace("- {path: d}", "- {path: d, type: sharegpt.x}"), "rows of type sharegpt.x are not known here"),
    ],
)  # fmt: skip
def test_what_would_be_lost_stops(converted, text, part):
    assert_stops(converted, text, part, FILE)


def test_everything_that_would_be_lost_is_said_at_once(converted):
    with pytest.raises(UserError) as caught:
        converted(
            LORA + "peft_layers_to_transform: [0]\nrope_scaling: {type: linear}\nadded_tokens_overrides: {1: x}\n"
        )
    assert [error.args[0].split(": ")[1] for error in caught.value.errors] == [
        "peft_layers_to_transform", "rope_scaling", "added_tokens_overrides",
    ]  # fmt: skip


def test_unknown_keys_are_loud(converted):
    changed = notes(converted(MINIMAL + "zzz: 1\nneftune_noise_alpha: 5\nval_set_size: 0.1\n"), "new")
    assert changed["zzz"] == "not a key of Axolotl that is known here; dropped"
    assert {"neftune_noise_alpha", "val_set_size", "excess_length_strategy", "router_aux_loss_coef"} <= set(changed)


def test_several_sets_are_a_mixture(converted):
    data = converted(MINIMAL + "- {path: e, split: s, type: chatml.intel}\nval_set_size: 0.1\n").values["data"]
    assert data["datasets"] == [
        {"name": "d", "fraction": 1.0},
        {"name": "e", "split": "s", "fraction": 1.0, "format": "conversation", "columns": {"prompt": "question"}},
    ]
    assert data["eval_fraction"] == 0.1
    files = converted(MINIMAL.replace("{path: d}", "{path: d, data_files: [a.jsonl, b.jsonl]}")).values["data"][
        "datasets"
    ]
    assert files == [{"name": "d", "data_files": ["a.jsonl", "b.jsonl"], "fraction": 1.0}]


def test_several_evaluation_sets_have_names(converted):
    text = MINIMAL + "test_datasets:\n- {path: who/a, split: test}\n- {path: b.jsonl}\n"
    data = converted(text).values["data"]
    assert data["eval_dataset_name"] == {"a": "who/a", "b": "b.jsonl"}
    assert data["eval_dataset_split"] == {"a": "test", "b": "train"}
    with pytest.raises(UserError, match=r"test_datasets: e is read in another way .format, columns. than"):
        converted(MINIMAL + "test_datasets:\n- {path: e, type: chatml.intel}\n")


def test_a_batch_of_an_unknown_number_of_processes_is_loud(converted):
    text = MINIMAL + "deepspeed: zero3.json\n"
    assert "deepspeed mean several" in notes(converted(text), "new")["num_processes"]
    assert "num_processes" not in notes(converted(text, num_processes=8), "new")
