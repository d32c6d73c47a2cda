"""LLaMA-Factory's files, with the ``dataset_info.json`` beside them."""

from __future__ import annotations

import json

import pytest

from engine.errors import UserError

from .recipes import assert_stops, convert, notes

FILE = "lf.yaml"
MINIMAL = "model_name_or_path: m\nstage: dpo\nfinetuning_type: full\ndataset: pairs\n"
LORA = MINIMAL.replace("full", "lora")
INFO = {
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "instruction", "query": "input",
              "chosen": "good", "rejected": "bad"}},
    "chats": {"hf_hub_url": "who/chats", "subset": "en", "ranking": True, "formatting": "sharegpt", "split": "part",
              "num_samples": 10, "columns": {"messages": "talk", "chosen": "chosen", "rejected": "rejected"},
              "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "gpt"}},
    "plain": {"file_name": "plain.json"},
    "seen": {"file_name": "seen.json", "ranking": True, "columns": {"prompt": "q", "images": "images"}},
    "script": {"script_url": "load.py", "ranking": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def dataset_info(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))


def test_its_defaults_are_written(run):
    assert run(MINIMAL) == {
        "model.model_name_or_path": "m",
        "model.dtype": "float32",
        "data.dataset_name": "data/pairs.json",
        "data.format": "conversation",
        "data.columns": {"prompt": "instruction", "chosen": "good", "rejected": "bad"},
        "data.max_length": 2048,
        "packing.pairs_per_step": 8,
        "packing.tokens_per_pack": 8 * 2 * 2048,
        "loss.router_aux_loss_coef": 0,
        "optim.learning_rate": 5e-5,
        "train.num_train_epochs": 3,
        "train.logging_steps": 500,
        "train.gradient_checkpointing": True,
        "train.report_to": (),
    }


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("pref_beta: 0.3\npref_ftx: 0.5\n", {"loss.beta": 0.3, "loss.rpo_alpha": 0.5}),
        ("pref_loss: ipo\n", {"loss.loss_type": "ipo"}),
        ("pref_loss: simpo\nsimpo_gamma: 1.2\n", {"loss.loss_type": "simpo", "loss.simpo_gamma": 1.2}),
        ("dpo_label_smoothing: 0.1\n", {"loss.label_smoothing": 0.1}),
        ("pref_bco_weight: 0.25\n", {"loss.loss_type": ("sigmoid", "bco_pair"), "loss.loss_weights": (0.8, 0.2)}),
        ("ld_alpha: 0.5\n", {"loss.ld_alpha": 0.5}),
        ("moe_aux_loss_coef: 0.01\n", {"loss.router_aux_loss_coef": 0.01}),
        ("cutoff_len: 4096\nbf16: true\n", {"data.max_length": 4096, "model.dtype": None}),
        ("max_samples: 100\nval_size: 0.1\n", {"data.max_rows": 100, "data.eval_fraction": 0.1}),
        (
            "val_size: 0.1\neval_strategy: steps\neval_steps: 5\nearly_stopping_steps: 3\n"
            "load_best_model_at_end: true\nsave_steps: 5\nrun_name: a\nswanlab_project: p\n",
            {
                "train.early_stopping_patience": 3,
                "train.load_best_model_at_end": True,
                "train.run_name": "a",
                "train.project": "p",
            },
        ),
        ("disable_shuffling: true\n", {"packing.shuffle": False}),
        ("disable_gradient_checkpointing: true\n", {"train.gradient_checkpointing": None}),
        ("flash_attn: fa2\nref_model: m0\n", {"model.attention": "flash", "reference.model_name_or_path": "m0"}),
        ("eval_dataset: pairs\neval_strategy: steps\neval_steps: 5\n", {"train.eval_steps": 5}),
    ],
)
def test_keys_are_converted(run, lines, expected):
    found = run(MINIMAL + lines)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", {"model.lora.r": 8, "model.lora.alpha": 16, "model.lora.target_modules": "all-linear"}),
        ("lora_rank: 4\nlora_target: q_proj,v_proj\nadditional_target: lm_head\n",
         {"model.lora.r": 4, "model.lora.alpha": 8, "model.lora.target_modules": ("q_proj", "v_proj"),
          "model.lora.modules_to_save": ("lm_head",)}),
        ("quantization_bit: 4\nuse_dora: true\n", {"model.quantization": "nf4", "model.lora.use_dora": True}),
        ("adapter_name_or_path: out\n",
         {"model.adapter_name_or_path": "out", "reference.model_name_or_path": "m", "model.lora.r": None}),
    ],
)  # fmt: skip
def test_adapters(run, lines, expected):
    found = run(LORA + lines)
    assert {key: found.get(key) for key in expected} == expected


CHATS = {
    "name": "who/chats",
    "config": "en",
    "split": "part",
    "rows": 10,
    "format": "messages",
    "columns": {"messages": "talk"},
    "turn_fields": {"role": "who", "content": "says"},
    "roles": {"customer": "user"},
}


def test_described_sets(converted):
    assert converted(MINIMAL.replace("pairs", "chats")).values["data"]["datasets"] == [CHATS]
    both = MINIMAL.replace("pairs", "[chats, pairs]")
    one, other = converted(both).values["data"]["datasets"]
    assert one == CHATS
    assert (other["name"], other["fraction"], other["columns"]["chosen"]) == ("data/pairs.json", 1.0, "good")
    drawn = converted(both + "mix_strategy: interleave_under\ninterleave_probs: 0.3,0.7\n")
    assert [one["weight"] for one in drawn.values["data"]["datasets"]] == [0.3, 0.7]
    assert {"mix_strategy", "interleave_probs"} <= set(notes(drawn, "new"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (MINIMAL.replace("dpo", "sft"), "line 2: stage: the string 'sft' does not train on preferences"),
        (MINIMAL.replace("full", "freeze"), "finetuning_type: the string 'freeze' is not supported"),
        (MINIMAL + "pref_loss: kto_pair\n", "pref_loss: KTO is a stage of its own"),
        (MINIMAL.replace("pairs", "pears"), "pears is not in dataset_info.json; did you mean pairs?"),
        (MINIMAL.replace("pairs", "plain"), "plain has no pairs: ranking is not true"),
        (MINIMAL.replace("pairs", "seen"), "seen has images, which are not read"),
        (MINIMAL.replace("pairs", "script"), "script is read by a script"),
        (MINIMAL.replace("pairs", "pairs,chats") + "interleave_probs: '1'\n", "1 probabilities for 2 data sets"),
        (MINIMAL + "dataset_dir: /nowhere\n", "no dataset_info.json in /nowhere"),
        (LORA + "pissa_init: true\n", "pissa_init: adapters have one rank"),
        (LORA + "adapter_name_or_path: a,b\n", "adapters below a fresh one are not supported"),
        (LORA + "quantization_bit: 3\n", "3 bits by bnb are not supported"),
        (MINIMAL + "rope_scaling: linear\n", "rope_scaling: models and their tokens are trained as they are"),
        (MINIMAL + "cutof_len: 4096\n", "that is known here; did you mean cutoff_len?"),
        (MINIMAL + "dataset_name: d\n", "has keys of LLaMA-Factory (finetuning_type, stage) and of TRL (dataset_name)"),
        (MINIMAL + "sequence_len: 5\n", "has keys of Axolotl (sequence_len) and of LLaMA-Factory"),
    ],
)  # fmt: skip
def test_what_would_be_lost_stops(converted, text, part):
    assert_stops(converted, text, part)


def test_a_set_without_its_description_stops(tmp_path):
    (tmp_path / "data" / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"lf.yaml, line 4: dataset: no dataset_info.json in data"):
        convert(tmp_path / "lf.yaml", MINIMAL)


def test_what_differs_is_loud(converted):
    changed = notes(converted(MINIMAL + "use_galore: true\nld_alpha: 0.1\ntemplate: qwen\nzzz: 1\n"), "new")
    assert {"use_galore", "ld_alpha", "template", "cutoff_len", "zzz"} <= set(changed)
    assert "moe_aux_loss_coef" in notes(converted(MINIMAL + "moe_aux_loss_coef: 0.1\n"), "new")
