"""open-instruct's files and commands."""

from __future__ import annotations

import pytest

from .recipes import assert_stops, notes

FILE = "oi.yaml"
MINIMAL = "model_name_or_path: m\nmixer_list: [d, 1.0]\nmax_seq_length: 2048\n"


def test_its_defaults_are_written(run):
    assert run(MINIMAL) == {
        "model.model_name_or_path": "m",
        "data.dataset_name": "d",
        "data.max_length": 2048,
        "packing.pairs_per_step": 8,
        "packing.tokens_per_pack": 8 * 2 * 2048,
        "loss.loss_type": "sigmoid_norm",
        "loss.beta": 5,
        "loss.router_aux_loss_coef": 0,
        "optim.learning_rate": 2e-5,
        "optim.warmup_steps": 0.1,
        "optim.max_grad_norm": 0,
        "train.output_dir": "output/",
        "train.save_total_limit": 3,
        "train.logging_steps": 1,
        "train.report_to": (),
    }


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("loss_type: dpo\nbeta: 0.1\n", {"loss.loss_type": None, "loss.beta": None}),
        ("loss_type: simpo\nbeta: 10\ngamma_beta_ratio: 0.3\n",
         {"loss.loss_type": "simpo", "loss.beta": 10, "loss.simpo_gamma": 3.0}),
        ("loss_type: wpo\n", {"loss.use_weighting": True}),
        ("load_balancing_loss: true\n", {"loss.router_aux_loss_coef": 0.001}),
        ("use_lora: true\nlora_rank: 8\n", {"model.lora.r": 8, "model.lora.alpha": 16, "model.lora.dropout": 0.1}),
        ("use_lora: true\nuse_qlora: true\n", {"model.quantization": "nf4", "optim.optimizer": "paged_adamw"}),
        ("checkpointing_steps: epoch\nwith_tracking: true\n", {"train.report_to": ("wandb",)}),
        ("activation_memory_budget: 0.5\n", {"train.gradient_checkpointing": True}),
        ("exp_name: a\nwandb_project: p\n", {"train.run_name": "a", "train.project": "p"}),
        ("max_train_samples: 50\nmax_train_steps: 7\n", {"data.max_rows": 50, "train.max_steps": 7}),
    ],
)  # fmt: skip
def test_keys_are_converted(run, lines, expected):
    found = run(MINIMAL + lines)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        ("mixer_list: [d, '0.5']", {"datasets": [{"name": "d", "fraction": 0.5}]}),
        ("dataset_mixer: {d: 0.5}", {"dataset_name": "d", "dataset_train_split": "train[:50%]"}),
        ("mixer_list: [d, 100]", {"datasets": [{"name": "d", "rows": 100}]}),
        ("mixer_list: [d, '1.5', e, 7]\nmixer_list_splits: [s, train]",
         {"datasets": [{"name": "d", "split": "s", "fraction": 1.5}, {"name": "e", "rows": 7}]}),
        ("dataset_mixer_list: [d, 1.0]\ndataset_mixer_list_splits: [prefs]",
         {"dataset_name": "d", "dataset_train_split": "prefs"}),
        ("dataset_mixer: {d: 1.0, e: 0.335}",
         {"datasets": [{"name": "d", "fraction": 1.0}, {"name": "e", "fraction": 0.335}]}),
        ("dataset_name: d", {"dataset_name": "d"}),
        ("mixer_list: [a/d, 1.0, b/d, 1.0, b/d, 1.0, c/d-2, 1.0]",
         {"datasets": [{"name": "a/d", "fraction": 1.0}, {"name": "b/d", "fraction": 1.0, "label": "d-3"},
                       {"name": "b/d", "fraction": 1.0, "label": "d-4"}, {"name": "c/d-2", "fraction": 1.0}]}),
    ],
)  # fmt: skip
def test_data_sets(converted, mixer, expected):
    conversion = converted(MINIMAL.replace("mixer_list: [d, 1.0]", mixer))
    assert conversion.values["data"] == {**expected, "max_length": 2048}
    # Whichever part of a set an epoch takes, the next takes another.
    partly = any("rows" in one or one["fraction"] % 1 for one in expected.get("datasets", ()))
    said = [text for text in notes(conversion, "new").values() if "goes on where the last one ended" in text]
    assert len(said) == partly


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (MINIMAL + "loss_type: ipo\n", "loss_type: the string 'ipo' is not a loss"),
        (MINIMAL + "use_qlora: true\n", "use_qlora: a quantised model is trained with adapters alone"),
        (MINIMAL + "rope_scaling_factor: 8\n", "rope_scaling_factor: models are trained as they are"),
        (MINIMAL.replace("[d, 1.0]", "[d]"), "mixer_list: expected names and amounts by turns"),
        (MINIMAL + "max_seq_lenght: 5\n", "did you mean max_seq_length?"),
    ],
)
def test_what_would_be_lost_stops(converted, text, part):
    assert_stops(converted, text, part)


def test_what_differs_is_loud(converted):
    changed = notes(converted(MINIMAL + "chat_template_name: tulu\nadd_bos: true\noptimizer_type: muon\n"), "new")
    assert {"chat_template_name", "add_bos", "optimizer_type", "transform_fn"} <= set(changed)
