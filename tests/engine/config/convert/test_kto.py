"""KTO of every trainer: losses, weights of labels, orders of rows, and layouts of data."""

from __future__ import annotations

import json

import pytest

from engine.config import build_config
from engine.data.rows import RowReader
from engine.data.sources import Row

from .recipes import TRL, assert_stops, convert, notes, written

SCRIPT = """from trl import KTOConfig, KTOTrainer
args = KTOConfig(output_dir="o"{config})
rows = {rows}
KTOTrainer("m", args=args, train_dataset=rows).train()
"""
ROWS = "load_dataset('d', split='train')"
AXOLOTL = "base_model: m\nrl: kto\nlearning_rate: 1\nmicro_batch_size: 4\nremove_unused_columns: false\ndatasets:\n- "
FACTORY = "model_name_or_path: m\nstage: kto\nfinetuning_type: full\ndataset: {}\n"
SWIFT = "rlhf_type: kto\nmodel: m\ndataset: d\ntuner_type: full\n"
INFO = {
    "told": {"file_name": "told.json", "columns": {"prompt": "ask", "query": "more", "response": "said",
             "system": "sys", "kto_tag": "good"}},
    "talk": {"file_name": "talk.json", "formatting": "sharegpt", "columns": {"messages": "turns", "kto_tag": "good"},
             "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "clerk"}},
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "a", "chosen": "b", "rejected": "c"}},
    "plain": {"file_name": "plain.json", "columns": {"prompt": "a", "response": "b"}},
}  # fmt: skip
ASKED, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
WEIGHTS = {"loss.desirable_weight": 0.5, "loss.undesirable_weight": 2.0}


def of_kto(name: str, text: str, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    return convert(tmp_path / name, text)


CASES = {
    "script": ("kto.py", SCRIPT.format(rows=ROWS, config=", beta=0.2, desirable_weight=0.5, undesirable_weight=2"),
               {"loss.loss_type": "kto", "loss.beta": 0.2, "packing.shuffle": False, "packing.pairs_per_step": 8,
                "packing.tokens_per_pack": 8 * 1024, "data.dataset_name": "d", **WEIGHTS}),
    "script, no divergence": ("kto.py", SCRIPT.format(rows=ROWS, config=", loss_type='apo_zero_unpaired'"),
                              {"loss.loss_type": "apo_zero_unpaired", "packing.shuffle": False}),
    "script of pairs": ("kto.py", SCRIPT.format(rows=f"maybe_unpair_preference_dataset({ROWS}, num_proc=4)", config=""),
                        {"loss.loss_type": "kto", "data.dataset_name": "d", "loss.desirable_weight": None}),
    "command": ("kto.sh", "trl kto --model_name_or_path m --dataset_name d --per_device_train_batch_size 4 "
                "--desirable_weight 0.5 --undesirable_weight 2", {"loss.loss_type": "kto", "packing.pairs_per_step": 4,
                                                                  "packing.shuffle": False, **WEIGHTS}),
    "script as a command": ("run.sh", "accelerate launch --num_processes 2 trl/scripts/kto.py --model_name_or_path m "
                            "--dataset_name d", {"loss.loss_type": "kto", "packing.pairs_per_step": 16}),
    "yaml": ("kto.yaml", TRL + "desirable_weight: 0.5\nundesirable_weight: 2\n",
             {"loss.loss_type": "kto", "packing.shuffle": False, **WEIGHTS}),
    "yaml by its loss": ("kto.yaml", TRL + "loss_type: apo_zero_unpaired\ntrain_sampling_strategy: random\n",
                         {"loss.loss_type": "apo_zero_unpaired", "packing.shuffle": None}),
    "axolotl": ("ax.yml", AXOLOTL + "{path: d, type: llama3.argilla}\nkto_desirable_weight: 0.5\n"
                "kto_undesirable_weight: 2\nrl_beta: 0.2\ndpo_use_weighting: true\n",
                {"loss.loss_type": "kto", "loss.beta": 0.2, "data.format": "labelled", "packing.shuffle": None,
                 "packing.pairs_per_step": 4, "loss.use_weighting": None, **WEIGHTS}),
    "axolotl in order": ("ax.yml", AXOLOTL + "{path: d}\nkto_desirable_weight: 0\nshuffle_merged_datasets: false\n",
                         {"packing.shuffle": False, "loss.desirable_weight": None, "data.format": None}),
    "llama-factory": ("lf.yaml", FACTORY.format("told") + "pref_beta: 0.2\nkto_chosen_weight: 0.5\n"
                      "kto_rejected_weight: 2\npref_loss: sigmoid\ndpo_label_smoothing: 0.1\nld_alpha: 0.5\n",
                      {"loss.loss_type": "kto", "loss.beta": 0.2, "data.format": "labelled", "packing.shuffle": None,
                       "loss.ld_alpha": None, **WEIGHTS}),
    "llama-factory in order": ("lf.yaml", FACTORY.format("talk") + "disable_shuffling: true\n",
                               {"packing.shuffle": False, "data.format": "labelled"}),
    "ms-swift": ("swift.yaml", SWIFT + "beta: 0.2\ndesirable_weight: 0.5\nundesirable_weight: 2\nrpo_alpha: 1\n",
                 {"loss.loss_type": "kto", "loss.beta": 0.2, "packing.pairs_per_step": 16, "loss.rpo_alpha": None,
                  "packing.shuffle": None, **WEIGHTS}),
    "ms-swift, no divergence": ("swift.sh", "swift rlhf --rlhf_type kto --loss_type apo_zero_unpaired --model m "
                                "--dataset d --columns '{\"ask\": \"query\"}'",
                                {"loss.loss_type": "apo_zero_unpaired", "data.format": "labelled",
                                 "data.columns": {"prompt": "ask", "completion": "response"}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kto_is_converted(case, tmp_path):
    name, text, expected = CASES[case]
    found = written(of_kto(name, text, tmp_path), tmp_path)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "text", "row", "asked"),
    [
        ("ax.yml", AXOLOTL + "{path: d, type: chatml.argilla}",
         {"system": "S", "instruction": "Q", "completion": "A", "label": True}, "SQ"),
        ("ax.yml", AXOLOTL + "{path: d, type: llama3.intel}",
         {"question": "Q", "completion": "A", "label": False}, "Q"),
        ("ax.yml", AXOLOTL + "{path: d, type: chatml.ultra}", {"prompt": "Q", "completion": "A", "label": True}, "Q"),
        ("ax.yml", AXOLOTL + "{path: d, type: chatml.argilla_chat}",
         {"prompt": "Q", "completion": [ASKED, SAID], "label": False}, "Q"),
        ("ax.yml", AXOLOTL + "{path: d, type: {field_prompt: ask, field_completion: said, field_label: good}}",
         {"ask": "Q", "said": "A", "good": True}, "text"),
        ("ax.yml", AXOLOTL + "{path: d, type: {field_prompt: ask, prompt_format: '[{prompt}]', field_label: good}}",
         {"ask": "Q", "completion": "A", "good": True}, "Q"),
        ("lf.yaml", FACTORY.format("told"), {"ask": "Q", "more": "", "said": "A", "sys": "S", "good": False}, "SQ"),
        ("lf.yaml", FACTORY.format("talk"),
         {"turns": [{"who": "customer", "says": "Q"}, {"who": "clerk", "says": "A"}], "good": True}, "Q"),
        ("swift.yaml", SWIFT, {"messages": [ASKED, SAID], "label": False}, "Q"),
        ("swift.yaml", SWIFT + "columns: {ask: query, said: response, good: label}\n",
         {"ask": "Q", "said": "A", "good": 1}, "Q"),
    ],
)  # fmt: skip
def test_rows_are_read_as_they_are_meant(name, text, row, asked, tmp_path):
    data = build_config(of_kto(name, text + "\n", tmp_path).values, "file.yaml").data
    example = RowReader(data, use_messages=True)(Row(0, row, "file"))
    label = next(row[key] for key in ("label", "good") if key in row)
    assert example.desirable is bool(label)
    if asked == "text":
        assert (example.kind, example.prompt, example.completions) == ("text", "Q", ("A",))
        return
    turns = {"Q": [ASKED], "SQ": [{"role": "system", "content": "S"}, ASKED]}[asked]
    assert (example.prompt, example.completions) == (turns, ([SAID],))


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("kto.yaml", TRL + "loss_type: kto\ntrain_sampling_strategy: random\n",
         "line 4: train_sampling_strategy: the string 'random' is refused by TRL for loss_type kto"),
        ("kto.yaml", TRL + "loss_type: kto\nper_device_train_batch_size: 1\n",
         "packing.pairs_per_step must be at least"),
        ("kto.yaml", TRL + "loss_type: kto\nrpo_alpha: 1\n", "loss.rpo_alpha is for pairs"),
        ("kto.yaml", TRL + "loss_type: sigmoid\ndesirable_weight: 2\n", "it has no meaning for loss_type sigmoid"),
        ("kto.yaml", TRL + "desirable_weigth: 2\n", "did you mean desirable_weight?"),
        ("ax.yml", AXOLOTL + "{path: d, type: chat_template.default}\n", "rows of type chat_template.default"),
        ("lf.yaml", FACTORY.format("pairs"), "pairs has pairs or no column kto_tag"),
        ("lf.yaml", FACTORY.format("plain"), "plain has pairs or no column kto_tag"),
        ("lf.yaml", FACTORY.format("told") + "pref_ftx: 0.1\n", "line 5: pref_ftx: kto takes no likelihood"),
        ("lf.yaml", FACTORY.format("pairs").replace("kto", "dpo") + "pref_loss: kto_pair\n", "set stage to kto"),
        ("swift.yaml", SWIFT + "loss_type: sigmoid\n", "loss_type: the string 'sigmoid' is no loss of kto"),
        ("swift.yaml", SWIFT + "calculate_KL: false\n", "line 5: calculate_KL: loss_type kto has a divergence"),
    ],
)  # fmt: skip
def test_what_would_be_lost_stops(name, text, part, tmp_path):
    assert_stops(lambda given: of_kto(name, given, tmp_path), text, part)


def test_what_differs_is_loud(tmp_path):
    accumulated = of_kto("kto.yaml", TRL + "loss_type: kto\ngradient_accumulation_steps: 2\n", tmp_path)
    assert "in the whole step" in notes(accumulated, "new")["gradient_accumulation_steps"]
    assert "here in the step" in notes(of_kto("lf.yaml", FACTORY.format("told"), tmp_path), "new")["stage"]
    assert "rlhf_type" in notes(of_kto("swift.yaml", SWIFT, tmp_path), "new")
