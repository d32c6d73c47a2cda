"""What TRL and this engine leave on disk: the same log-probs, special tokens and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
    trainer_utils,
)

from benchmarks.trl_peer import train_with_trl
from engine.config import build_config
from engine.data import load_dataset_groups
from engine.model import load_tokenizer
from engine.train.loop import train
from tests.engine.conftest import CHAT_TEMPLATE, build_tokenizer, preference_rows
from tests.engine.exported import plain_logps

pytest.importorskip("trl")

STEPS, PAIRS = 3, 4
LEARNING_RATE = 1e-3
ABSOLUTE = 1e-4
"""In nats per token."""

KEEPS_SEVERAL_EOS = hasattr(trainer_utils, "_align_special_token")
"""Earlier trainers of transformers write the tokenizer's EOS alone into config.json, and all of them for generation."""
IDS = ("eos_token_id", "bos_token_id", "pad_token_id")

CASES: dict[str, tuple[dict[str, str | None], list[int] | int]] = {
    "as the model's": ({}, 2),
    "another EOS": ({"eos_token": "<|user|>"}, 2),
    "one of several EOS, no PAD": ({"pad_token": None}, [7, 2]),
    "another EOS than several, another BOS": ({"eos_token": "<|user|>", "bos_token": "<|system|>"}, [2, 7]),
}
"""Special tokens of the tokenizer, and the model's EOS."""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(STEPS * PAIRS)))
    return path


@pytest.mark.parametrize("name", CASES)
def test_the_saved_models_are_the_same(name, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
    model_dir, theirs, ours = tmp_path / "model", tmp_path / "theirs", tmp_path / "ours"
    tokens, eos = CASES[name]
    save_base(model_dir, eos)
    tokenizer = build_tokenizer(chat_template=CHAT_TEMPLATE)
    for token, value in tokens.items():
        setattr(tokenizer, token, value)
    tokenizer.save_pretrained(model_dir)
    steps = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "max_length": 160}
    train_with_trl(model_dir, data_file, tmp_path, pairs_per_step=PAIRS, save_to=theirs, **steps)
    config = build_config(
        {
            "model": {"model_name_or_path": str(model_dir), "dtype": "float32"},
            "data": {"dataset_name": str(data_file), "eval_dataset_name": str(data_file), "max_length": 160}
            | {"eval_dataset_split": "train"},
            "packing": {"pairs_per_step": PAIRS, "shuffle": False},
            "optim": {"learning_rate": LEARNING_RATE},
            "reference": {"store": str(tmp_path / "store")},
            "train": {"output_dir": str(ours), "max_steps": STEPS, "logging_steps": 1, "report_to": []},
        },
        "test",
    )
    train(config)
    assert_same_descriptions(ours, theirs)
    rows, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="eval")
    found, wanted = (
        plain_logps(AutoModelForCausalLM.from_pretrained(run).eval(), rows, torch.float32) for run in (ours, theirs)
    )
    lengths = torch.tensor([len(response) for group in rows for response in group.response_ids])
    assert ((found - wanted).abs() / lengths).max() <= ABSOLUTE


def save_base(folder: Path, eos: list[int] | int) -> None:
    """A tiny model without a padding token."""
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, num_key_value_heads=2, bos_token_id=1, eos_token_id=eos, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)


def listed(ids: list[int] | int) -> list[int]:
    return ids if isinstance(ids, list) else [ids]


def assert_same_descriptions(ours: Path, theirs: Path) -> None:
    configs = [json.loads((run / "config.json").read_text()) for run in (ours, theirs)]
    # TRL leaves the cache of generation switched off, which is a setting of its training.
    for key in {*configs[1], "dtype"} - {"use_cache", *([] if KEEPS_SEVERAL_EOS else ["eos_token_id"])}:
        assert configs[0].get(key) == configs[1].get(key), key
    found, wanted = (GenerationConfig.from_pretrained(run) for run in (ours, theirs))
    tokenizers = [AutoTokenizer.from_pretrained(run) for run in (ours, theirs)]
    if not KEEPS_SEVERAL_EOS:
        own = tokenizers[1].eos_token_id
        assert (configs[1]["eos_token_id"], own in listed(configs[0]["eos_token_id"])) == (own, True)
        assert set(listed(found.eos_token_id)) == set(listed(wanted.eos_token_id))
        wanted.eos_token_id = found.eos_token_id
    for name in IDS:
        assert getattr(found, name) == getattr(wanted, name), name
    for name in (*IDS, "chat_template"):
        assert getattr(tokenizers[0], name) == getattr(tokenizers[1], name), name
