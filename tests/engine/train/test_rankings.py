"""Whole runs on rankings and scored completions, beside runs on the pairs they stand for."""

from __future__ import annotations

import json
import math

import pytest

from engine.errors import UserError
from engine.reference import ReferenceStore
from engine.train.loop import train
from tests.engine.train.conftest import TRAJECTORY, assert_same_trajectory


def test_rankings_train(make_config, rows_of, tmp_path, caplog):
    words = ["blue", "green", "a river", "the old house has a red door"]
    rows = [
        {"prompt": f"Question {i}:", "responses": [f" {w} {i}" for w in words[:k]], "ranking": list(range(k))}
        for i, k in enumerate([2, 3, 4] * 4)
    ]
    data = tmp_path / "ranked.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = make_config(
        data={"dataset_name": str(data)},
        packing={"shuffle": False},
        loss={"loss_type": "plackett_luce"},
        # The folder that the tests of this process share may hold some of these responses already.
        reference={"store": str(tmp_path / "store")},
        train={"num_train_epochs": 6},
    )
    with caplog.at_level("INFO"):
        train(config)
    assert "12 of 12 rows are not stored; they are computed now" in caplog.text
    assert " of 6 rankings (3.0 responses each)" in caplog.text
    assert "sigmoid loss of the two best responses 0.693" in caplog.text
    logged = rows_of(config)
    expected = sum(math.log(math.factorial(k)) for k in (2, 3, 4)) / 3
    assert logged[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert logged[-1]["loss"] < 0.8 * logged[0]["loss"]
    with pytest.raises(UserError, match=r"row 1 has 3 responses"):
        train(make_config(data={"dataset_name": str(data)}, train={"output_dir": str(tmp_path / "pairs")}))


def test_a_run_on_rankings_of_two_is_a_dpo_run_to_the_bit(make_config, pairs_jsonl, rows_of, tmp_path):
    ranked = tmp_path / "ranked.jsonl"
    with open(ranked, "w") as file:
        for i, line in enumerate(pairs_jsonl.read_text().splitlines()):
            row = json.loads(line)
            responses, ranking = [row["chosen"], row["rejected"]], [1, 2]
            if i % 2:
                responses, ranking = responses[::-1], ranking[::-1]
            file.write(json.dumps({"prompt": row["prompt"], "responses": responses, "ranking": ranking}) + "\n")
    runs = {"sigmoid": pairs_jsonl, "plackett_luce": ranked}
    results = []
    for loss, data in runs.items():
        output_dir = tmp_path / loss
        config = make_config(
            data={"dataset_name": str(data)}, loss={"loss_type": loss}, train={"output_dir": str(output_dir)}
        )
        train(config)
        rows = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows_of(config)]
        results.append((rows, (output_dir / "model.safetensors").read_bytes()))
    assert results[0] == results[1]


def test_a_run_on_scored_completions_is_a_run_on_their_pairs(make_config, pairs_jsonl, rows_of, tmp_path):
    """The same pairs in the same steps, with half of the responses computed and stored twice or once."""
    sources = [json.loads(line) for line in pairs_jsonl.read_text().splitlines()]
    scored, expanded = tmp_path / "scored.jsonl", tmp_path / "expanded.jsonl"
    with open(scored, "w") as one, open(expanded, "w") as many:
        for row, other in zip(sources[:12], sources[12:], strict=True):
            answers = [row["chosen"], other["chosen"], row["rejected"]]
            line = {"prompt": row["prompt"], "responses": [answers[i] for i in (2, 0, 1)], "scores": [0.5, 9, 3]}
            one.write(json.dumps(line) + "\n")
            for a, b in ((0, 1), (0, 2), (1, 2)):
                line = {"prompt": row["prompt"], "chosen": answers[a], "rejected": answers[b]}
                many.write(json.dumps(line) + "\n")
    results = []
    for name, path, per_step in (("scored", scored, 4), ("expanded", expanded, 12)):
        config = make_config(
            data={"dataset_name": str(path), "eval_dataset_name": str(path)},
            packing={"pairs_per_step": per_step, "shuffle": False},
            train={"output_dir": str(tmp_path / name), "eval_steps": 2},
            reference={"store": str(tmp_path / f"store-{name}")},
        )
        result = train(config)
        results.append((rows_of(config), result.metrics))
    assert_same_trajectory(results[0][0], results[1][0], tolerance=2e-5, names=TRAJECTORY[:-1])
    # Sequences that are counted: three of a prompt, or two of each of its three pairs.
    assert results[1][0][-1]["num_tokens"] == 2 * results[0][0][-1]["num_tokens"]
    assert results[0][1]["eval_num_pairs"] == results[1][1]["eval_num_pairs"] == 36
    for key in ("eval_loss", "eval_rewards/accuracies", "eval_logps/chosen"):
        assert results[0][1][key] == pytest.approx(results[1][1][key], rel=1e-5)
    stores = [ReferenceStore(tmp_path / f"store-{name}") for name in ("scored", "expanded")]
    assert len(stores[0]) == len(stores[1]) == 36
