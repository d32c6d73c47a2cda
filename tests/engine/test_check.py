"""The text of ``dpo check``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from engine.check import check
from engine.config.schema import DataConfig, LossConfig, ModelConfig, RunConfig
from engine.errors import UserError
from engine.train.setup import check_settings
from tests.engine.conftest import preference_rows


def run_config(model, **data):
    return RunConfig(model=ModelConfig(model_name_or_path=str(model)), data=DataConfig(**data))


def test_train_and_evaluation_data(tiny_model_dir, pairs_jsonl):
    name = str(pairs_jsonl)
    text = check(run_config(tiny_model_dir, dataset_name=name, eval_dataset_name=name, max_rows=5, max_length=40)).text
    assert text.startswith("chat template: the tokenizer's\n")
    assert text.count(f"{name}: 5 preference rows") == 2
    train, evaluation = text.split("\n\neval data\n")
    assert "train data\n" in train
    for part in (train, evaluation):
        header = next(line for line in part.splitlines() if "median" in line)
        assert header.split() == ["min", "median", "90%", "99%", "max", "mean", "total"]
        assert "tokens (prompt + response at most 40)" in part
    assert "  truncated" in train
    assert "data.strict" not in text


def test_example_shows_the_boundary(tiny_model_dir, tmp_path):
    rows = [{"prompt": "Tell me.", "responses": [" bad", " best", " fair" * 30], "ranking": [3, 1, 2]}]
    (tmp_path / "k.json").write_text(json.dumps(rows))
    text = check(run_config(tiny_model_dir, dataset_name=str(tmp_path / "k.json"), max_length=None)).text
    assert "  prompt        'Tell me.'\n  rank 1, best  ' best</s>'\n  rank 2        ' fair" in text
    assert "' ... '" in text
    assert "  rank 3        ' bad</s>'" in text
    assert "tokens (no limit)" in text


def test_the_example_is_one_of_more_than_two_responses(tiny_model_dir, tmp_path):
    rows = [
        {"prompt": "Tell me.", "responses": [" bad", " best"], "scores": [1, 3]},
        {"prompt": "And me.", "responses": [" bad", " best", " fair"], "scores": [1, 3, 2]},
    ]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    text = check(run_config(tiny_model_dir, dataset_name=str(tmp_path / "s.json"))).text
    assert "row 0 as" not in text
    assert "row 1 as the model reads it\n  prompt      'And me.'\n  response 1  ' best</s>'" in text
    assert "  pairs       1 over 2, 1 over 3, 2 over 3" in text


def test_strict_reports_everything_and_says_that_training_would_stop(tiny_model_dir, pairs_jsonl):
    config = run_config(tiny_model_dir, dataset_name=str(pairs_jsonl), max_length=40, strict=True)
    checked = check(config)
    assert "training would stop: " in checked.text
    assert "or set data.strict: false" in checked.obstacles[0]
    assert "tokens (" in checked.text


def test_rows_that_stop_training_are_told_once(tiny_model_dir, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "choosen": " b", "rejected": " c"}) + "\n")
    checked = check(run_config(tiny_model_dir, dataset_name=str(tmp_path / "p.jsonl")))
    assert [reason.split(": ")[1] for reason in checked.obstacles] == ["1 of 1 rows cannot be used (missing_column)"]
    assert "is choosen meant to be chosen?" in checked.text


def test_faults_end_it(tiny_model_dir, pairs_jsonl, tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl does not exist"):
        check(run_config(tiny_model_dir, dataset_name=str(tmp_path / "absent.jsonl")))
    checked = check(run_config(tiny_model_dir, dataset_name=str(pairs_jsonl), max_length=2))
    assert "none of 24 rows can be used" in checked.obstacles[0]
    assert "prompt_too_long  24  dropped  rows 0, 1, 2, 3, 4, ..." in checked.text


def test_lengths_that_tell_the_sides_apart(tiny_model_dir, tmp_path):
    rows = [{"prompt": f"Tell me {i}.", "chosen": " yes" * (2 + i % 5), "rejected": " no"} for i in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    config = run_config(tiny_model_dir, dataset_name=str(tmp_path / "a.json"))
    line = "chosen is longer than rejected in 100.0% of pairs, shorter in 0.0%: length alone nearly tells them apart"
    assert line in check(config).text


@pytest.mark.parametrize(("loss", "needed"), [("aot", "best_worst"), ("plackett_luce", "ranking")])
def test_several_pairs_that_the_loss_does_not_take_end_it(tiny_model_dir, tmp_path, loss, needed):
    row = {"prompt": "Tell me.", "responses": [" bad", " best", " fair"], "scores": [1, 3, 2]}
    (tmp_path / "scored.json").write_text(json.dumps([row]))
    config = run_config(tiny_model_dir, dataset_name=str(tmp_path / "scored.json"))
    assert check(config).obstacles == ()
    (obstacle,) = check(replace(config, loss=LossConfig(loss_type=loss))).obstacles
    assert f"loss.loss_type {loss} does not take several pairs of one prompt" in obstacle
    assert f"set data.scored_pairs to {needed}" in obstacle


def test_tokens_without_an_embedding_stop_as_in_training(tiny_model_dir, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    rows = [{"prompt_ids": [5], "chosen_ids": [6, 2], "rejected_ids": [last, 2]} for last in (299, 300)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    checked = check(run_config(folder, dataset_name=str(tmp_path / "rows.json")))
    assert checked.reports["train"].rows("beyond_embedding") == [1]
    assert "row 1: token 300 is outside the 300 embeddings of the model" in checked.text
    assert "1 of 2 rows cannot be used (beyond_embedding)" in checked.obstacles[0]
    composite = {"text_config": {"vocab_size": 400}}
    (folder / "config.json").write_text(json.dumps(composite))
    assert not check(run_config(folder, dataset_name=str(tmp_path / "rows.json"))).obstacles


def test_tokens_that_count_differently_are_marked(tiny_model_dir, tmp_path):
    rows = [{"prompt_ids": [5], "chosen_ids": [6, 7, 2], "rejected_ids": [8, 2]} for _ in range(2)]
    rows[1] |= {"chosen_weights": [1, 0.5, 0], "rejected_weights": [0, 1]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    text = check(run_config(tiny_model_dir, dataset_name=str(tmp_path / "rows.json"))).text
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    first, second, last, other = (repr(tokenizer.decode([token])) for token in (6, 7, 2, 8))
    assert "row 1 as the model reads it" in text
    assert f"  chosen    {first} [0.5: {second}] [0: {last}]\n" in text
    assert f"  rejected  [0: {other}] {last}\n" in text
    assert "[0: ...] is tokens that count nothing" in text


def test_a_mask_pattern_is_seen(tiny_model_dir, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(3)))
    plain = check(run_config(tiny_model_dir, dataset_name=str(path))).text
    assert "count nothing" not in plain
    assert "[0: '</s>']" in check(run_config(tiny_model_dir, dataset_name=str(path), mask_pattern="</s>")).text


def test_numbers_of_rows_are_told_and_those_without_a_meaning_end_it(tiny_model_dir, tmp_path):
    rows = [{**row, "weight": 1 + i, "margin": 0.5} for i, row in enumerate(preference_rows(3))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "weight": -1}]))
    config = run_config(tiny_model_dir, dataset_name=str(path), mask_pattern="no")
    found = check(config)
    assert "rows: weight 1 to 3; margin 0.5 to 0.5; " in found.text
    assert "% of completion tokens left out" in found.text
    assert "column 'weight' must not be negative, got -1" in found.text
    assert [reason.partition(": ")[2] for reason in found.obstacles] == ["1 of 4 rows cannot be used (bad_weight)"]
    refused = check(replace(config, loss=LossConfig(loss_type="apo_zero")))
    assert "rows have a column margin, which has no meaning for loss.loss_type apo_zero" in refused.obstacles[-1]


def test_a_beta_of_whole_responses_is_warned_of_with_simpo(tiny_model_dir, pairs_jsonl, caplog):
    config = run_config(tiny_model_dir, dataset_name=str(pairs_jsonl))
    for beta, warned in ((0.1, True), (2.0, False)):
        changed = replace(config, loss=LossConfig(loss_type="simpo", beta=beta))
        words = f"loss.beta {beta:g} is small for simpo, which compares log-probs per token"
        caplog.clear()
        check_settings(changed)
        assert (words in caplog.text) == (f"warning: {words}" in check(changed).text) == warned
