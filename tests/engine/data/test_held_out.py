"""Evaluation rows that are trained on are named; a share of the prompts is split off by content."""

from __future__ import annotations

import json

import pytest

from engine.check import check
from engine.config.schema import DataConfig, ModelConfig, PackingConfig, RunConfig, TrainConfig
from engine.data import load_dataset_groups
from engine.errors import UserError
from engine.report.page import _lint
from engine.train.loop import train

ROWS = [{"prompt": f"Where is lake {i}?", "chosen": f" In {i}.", "rejected": " No."} for i in range(40)]
EVALUATED = [
    ROWS[3],
    {"prompt": "Who?", "chosen": " a", "rejected": " b"},
    {"prompt": ROWS[5]["prompt"], "chosen": " Far.", "rejected": " Near."},
    ROWS[7] | {"chosen": ROWS[7]["rejected"], "rejected": ROWS[7]["chosen"]},
]


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def config_of(model, tmp_path, **data):
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(model), dtype="float32"),
        data=DataConfig(**data),
        packing=PackingConfig(pairs_per_step=4),
        train=TrainConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to=()),
    )


def test_evaluation_rows_that_are_trained_on_are_counted(write, tiny_model_dir, tmp_path, caplog):
    names = {"dataset_name": write("train.jsonl", ROWS), "eval_dataset_name": write("eval.jsonl", EVALUATED)}
    config = config_of(tiny_model_dir, tmp_path, **names)
    report = check(config).reports["eval"]
    assert {name: report.rows(name) for name in report.counts} == {"trained_row": [0, 3], "trained_prompt": [2]}
    train(config)
    assert "3 of 4 evaluation rows are not held out" in caplog.text
    lint = json.loads((tmp_path / "run" / "data.json").read_text())["lint"]
    assert lint["eval"]["counts"] == {"trained_row": 2, "trained_prompt": 1}
    assert any(row["name"].startswith("trained_row: ") and row["count"] == "2" for row in _lint(lint))
    with pytest.raises(UserError, match="trained_row in 2 of 4 rows"):
        train(config_of(tiny_model_dir, tmp_path / "strict", strict=True, **names))


@pytest.mark.parametrize("messages", [False, True])
def test_a_share_of_the_prompts_is_on_one_side_only(write, tiny_tokenizer, messages):
    rows = [*ROWS, *(row | {"chosen": " Elsewhere."} for row in ROWS)]
    options = {"eval_fraction": 0.3, "format": "conversation" if messages else "auto"}

    def prompts(rows, split):
        data = DataConfig(dataset_name=write("rows.jsonl", rows), **options)
        dataset, report = load_dataset_groups(data, tiny_tokenizer, split=split)
        assert report.total == report.kept == len(dataset)
        return {(group.row, group.prompt_ids.tobytes()) for group in dataset}

    trained, evaluated = prompts(rows, "train"), prompts(rows, "eval")
    assert len(trained) + len(evaluated) == len(rows)
    assert not {prompt for _, prompt in trained} & {prompt for _, prompt in evaluated}
    assert 10 <= len(evaluated) <= 40
    reversed_order = {(len(rows) - 1 - row, prompt) for row, prompt in prompts(rows[::-1], "eval")}
    assert reversed_order == evaluated


@pytest.mark.parametrize(
    ("row", "fraction", "message"),
    [
        ({"chosen": "Where? In 3.", "rejected": "Where? No."}, 0.3, "give prompts a column of their own"),
        (ROWS[0], 1e-9, r"data\.eval_fraction leaves this split none of 1 rows; give it another share"),
    ],
)
def test_a_split_that_cannot_be_made_says_so(write, tiny_tokenizer, row, fraction, message):
    data = DataConfig(dataset_name=write("rows.jsonl", [row]), eval_fraction=fraction)
    with pytest.raises(UserError, match=message):
        load_dataset_groups(data, tiny_tokenizer, split="eval")


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"data\.eval_fraction must be a share between 0 and 1, got 1"):
        DataConfig(dataset_name="x", eval_fraction=1.0)
    with pytest.raises(ValueError, match=r"leave data\.eval_dataset_name out"):
        DataConfig(dataset_name="x", eval_fraction=0.1, eval_dataset_name="y")
    assert DataConfig(dataset_name="x", eval_fraction=0.1).has_evaluation


def test_a_run_evaluates_what_it_split_off(write, tiny_model_dir, tmp_path):
    data = {"dataset_name": write("rows.jsonl", ROWS), "eval_fraction": 0.3}
    result = train(config_of(tiny_model_dir, tmp_path, **data))
    assert "eval_loss" in result.metrics
    assert json.loads((tmp_path / "run" / "data.json").read_text())["lint"]["eval"]["counts"] == {}
