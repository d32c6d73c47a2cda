"""The example configurations of published mixers: what they ask for, and that rows as published are read so.

Nothing is fetched: every Hub name is replaced by a local folder with its configurations, splits and columns.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.check import check
from engine.config import load_config
from engine.data import load_dataset_groups
from engine.data.sources import is_hub_name
from engine.packing import plan_first_epoch
from engine.train.feed import drawn_groups
from tests.engine.conftest import CHAT_TEMPLATE, build_tokenizer, save_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 8

SETTINGS = {
    "zephyr": {"pairs": 128, "loss": "sigmoid", "beta": 0.01, "rate": 5e-7, "max_length": 1024},
    "smollm3": {"pairs": 32, "loss": "apo_zero", "beta": 0.05, "rate": 1e-6, "max_length": 24576},
    "tulu3": {"pairs": 128, "loss": "sigmoid_norm", "beta": 5.0, "rate": 5e-7, "max_length": 2048},
    "olmo3": {"pairs": 128, "loss": "sigmoid_norm", "beta": 5.0, "rate": 1e-6, "max_length": 16384},
}
PER_EPOCH = {"zephyr": [8], "smollm3": [4, 2], "tulu3": [8] * 7, "olmo3": [100, 100, 1, 1, 1, 2, 1, 1, 1, 2]}
"""Rows of each set in an epoch where it has ``ROWS``; of olmo3, whose sets are counted, a 1,250th."""


def published_row(name: str, i: int, part: str) -> dict:
    """A row with the columns that the set has on the Hub."""
    asked = {"role": "user", "content": f"{name} asks {i} of {part}"}
    sides = ([asked, {"role": "assistant", "content": text}] for text in (f"Yes, {i}.", "No."))
    row = dict(zip(("chosen", "rejected"), sides, strict=True))
    if "ultrafeedback_binarized" in name:
        scores = {"score_chosen": 8.0, "score_rejected": 3.0}
        return {"prompt": asked["content"], "prompt_id": str(i), **row, "messages": row["chosen"], **scores}
    if "smoltalk2" in name:
        kwargs = {"custom_instructions": None, "enable_thinking": False, "python_tools": None, "xml_tools": None}
        return {**row, "prompt": asked["content"], "chat_template_kwargs": kwargs, "source": "x"}
    return {**row, "id": f"{name}-{i}", "source": name}


def mirror(folder: Path, name: str, config: str | None, splits: set[str]) -> None:
    """A set as a folder whose README.md lists its splits."""
    folder.mkdir(parents=True)
    files = []
    for split in sorted(splits):
        rows = (published_row(name, i, split) for i in range(ROWS))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append({"split": split, "path": f"{split}.jsonl"})
    front = {"configs": [{"config_name": config or "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), build_tokenizer(chat_template=CHAT_TEMPLATE))


@pytest.fixture
def local(tmp_path, model):
    """``local(example)``: its configuration with local data and a tiny model."""

    def local(example: str):
        path = EXAMPLES / f"{example}.yaml"
        sets = load_config(path).data.datasets
        overrides = ["--model.model_name_or_path", str(model), "--model.revision", "null"]
        for place, one in enumerate(sets):
            assert is_hub_name(one.name)
            folder = tmp_path / one.name
            if not folder.exists():
                same = [other for other in sets if other.name == one.name]
                splits = {s for other in same for s in (other.split, other.eval_split) if s is not None}
                mirror(folder, one.name, one.config, splits)
            overrides += [f"--data.datasets.{place}.name", str(folder)]
            if one.rows is not None:
                overrides += [f"--data.datasets.{place}.rows", str(max(1, one.rows // 1250))]
        return load_config(path, overrides)

    return local


@pytest.mark.parametrize("example", SETTINGS)
def test_the_numbers_are_those_of_the_recipe(example):
    config = load_config(EXAMPLES / f"{example}.yaml")
    found = {
        "pairs": config.packing.pairs_per_step,
        "loss": config.loss.loss_type,
        "beta": config.loss.beta,
        "rate": config.optim.learning_rate,
        "max_length": config.data.max_length,
    }
    assert found == SETTINGS[example]
    assert (config.optim.warmup_steps, config.train.num_train_epochs) == (0.1, 1)
    # Two whole rows fit into one pack, whatever they share.
    assert config.packing.tokens_per_pack >= 2 * config.data.max_length
    if example == "olmo3":
        assert sum(one.rows for one in config.data.datasets) == 260_000


@pytest.mark.parametrize("example", SETTINGS)
def test_rows_as_published_are_read_and_drawn(example, local):
    config = local(example)
    found = check(config)
    assert found.obstacles == ()
    problems = {name for report in found.reports.values() for name in report.counts}
    assert problems == set()
    dataset, report = load_dataset_groups(config.data, build_tokenizer(chat_template=CHAT_TEMPLATE), split="train")
    assert report.kept == ROWS * len(PER_EPOCH[example])
    assert list(dataset.mixture.counts) == PER_EPOCH[example]
    steps = plan_first_epoch(drawn_groups(config, dataset), config)
    assert sum(len(pack) for step in steps for pack in step) == sum(PER_EPOCH[example])
    if example == "zephyr":
        held_out, _ = load_dataset_groups(config.data, build_tokenizer(chat_template=CHAT_TEMPLATE), split="eval")
        assert len(held_out) == ROWS
