"""The example of KTO: the numbers of TRL's command, and a run on local rows with the columns of its set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.check import check
from engine.config import diff_from_defaults, load_config
from engine.config.convert import convert_file
from engine.train.loop import train
from tests.engine.conftest import CHAT_TEMPLATE, build_tokenizer, preference_rows, save_tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "kto.yaml"
COMMAND = """trl kto --dataset_name trl-lib/kto-mix-14k --model_name_or_path=trl-lib/qwen1.5-1.8b-sft \\
    --per_device_train_batch_size 16 --num_train_epochs 1 --learning_rate 5e-7 --lr_scheduler_type=cosine \\
    --gradient_accumulation_steps 1 --eval_strategy steps --eval_steps 500 --output_dir=runs/kto --warmup_steps 0.1
"""


def test_the_numbers_are_those_of_the_command(tmp_path):
    (tmp_path / "kto.sh").write_text(COMMAND)
    (tmp_path / "kto.yaml").write_text(convert_file(tmp_path / "kto.sh").to_yaml())
    found, converted = (diff_from_defaults(load_config(path)) for path in (EXAMPLE, tmp_path / "kto.yaml"))
    # The command names no trackers, and checkpoints by TRL's default.
    assert {key: value for key, (value, _) in found.items()} == {
        key: value for key, (value, _) in converted.items() if key not in ("train.report_to", "train.save_steps")
    }


@pytest.fixture
def local(tmp_path):
    """The example with a tiny model and local rows: two of three are desirable."""
    save_tiny_model(tmp_path / "model", build_tokenizer(chat_template=CHAT_TEMPLATE))
    for split, count in (("train", 40), ("test", 6)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{row['prompt']} {split} {i}"}],
                "completion": [{"role": "assistant", "content": row["chosen" if i % 3 else "rejected"]}],
                "label": bool(i % 3),
            }
            for i, row in enumerate(preference_rows(count))
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "model.model_name_or_path": tmp_path / "model", "data.dataset_name": tmp_path / "train.jsonl",
        "data.eval_dataset_name": tmp_path / "test.jsonl", "data.eval_dataset_split": "train",
        "train.output_dir": tmp_path / "run", "reference.store": tmp_path / "store", "train.eval_steps": 2,
        "model.dtype": "float32",
    }  # fmt: skip
    return load_config(EXAMPLE, [part for key, value in overrides.items() for part in (f"--{key}", str(value))])


def test_it_trains(local):
    found = check(local)
    assert found.obstacles == ()
    assert {name for report in found.reports.values() for name in report.counts} == set()
    result = train(local)
    # 40 rows, 16 a step.
    rows = [json.loads(line) for line in (Path(local.train.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    assert result.metrics["eval_count/chosen"] == 4
    assert {"eval_kl", "eval_loss", "eval_rewards/margins"} <= result.metrics.keys()
