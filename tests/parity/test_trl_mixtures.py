"""Twenty optimizer steps of mixtures of experts beside TRL, with and without the loss that balances their experts.

TRL computes that loss over micro-batches; here a step is one micro-batch, however many packs it is for the engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from benchmarks.trl_peer import train_with_trl
from engine.config import build_config, to_dict
from engine.config.schema import RunConfig
from engine.train.loop import train
from tests.engine.conftest import build_tokenizer, preference_rows
from tests.engine.distributed.launch import run_jobs
from tests.parity.test_trl_trajectory import METRICS, STEPS, TOKEN_METRICS
from tests.parity.test_trl_variants import assert_same_trajectory

pytest.importorskip("trl")

PAIRS = 3
LEARNING_RATE = 2e-3
COEFFICIENT = 0.3
"""Large enough that it decides where the weights go."""
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def _assumed_peak():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
        yield


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tokenizer = build_tokenizer()
    shape = SHAPE | {"vocab_size": len(tokenizer), "num_experts_per_tok": 2}
    makers = {
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(intermediate_size=32, num_local_experts=4, **shape)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(moe_intermediate_size=16, head_dim=8, num_experts=6, norm_topk_prob=True, **shape)
        ),
    }
    folders = {}
    for name, make in makers.items():
        set_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(STEPS * PAIRS)))
    return path


def make_config(model_dir: Path, data_file: Path, folder: Path, **sections: dict[str, Any]) -> RunConfig:
    values = {
        "model": {"model_name_or_path": str(model_dir), "dtype": "float32"},
        "data": {"dataset_name": str(data_file), "max_length": 160},
        "packing": {"pairs_per_step": PAIRS, "shuffle": False},
        "loss": {},
        "optim": {"learning_rate": LEARNING_RATE},
        "reference": {"store": str(folder / "store")},
        "train": {"output_dir": str(folder / "run"), "max_steps": STEPS, "logging_steps": 1, "report_to": []},
    }
    return build_config({name: value | sections.get(name, {}) for name, value in values.items()}, "test")


def run_trl(model_dir: Path, data_file: Path, folder: Path, **options: Any):
    options |= {"pairs_per_step": PAIRS, "max_steps": STEPS, "learning_rate": LEARNING_RATE, "max_length": 160}
    return train_with_trl(model_dir, data_file, folder, **options)


VARIANTS = {
    "balanced, one pack": (COEFFICIENT, {}),
    "balanced, small packs": (COEFFICIENT, {"packing": {"tokens_per_pack": 200}}),
    "balanced, checkpointing": (COEFFICIENT, {"train": {"gradient_checkpointing": True}}),
    "the model's own": (None, {"packing": {"tokens_per_pack": 200}}),
    "off": (0.0, {}),
}


@pytest.mark.parametrize(
    ("family", "variant"),
    [*(("mixtral", name) for name in VARIANTS), ("qwen3_moe", "balanced, small packs"), ("qwen3_moe", "off")],
)
def test_twenty_steps_equal_trl(family, variant, model_dirs, data_file, tmp_path):
    coefficient, sections = VARIANTS[variant]
    sections = {**sections, "loss": {"router_aux_loss_coef": coefficient}}
    train(make_config(model_dirs[family], data_file, tmp_path, **sections))
    recomputed = sections.get("train", {}).get("gradient_checkpointing", False)
    trl_run = run_trl(
        model_dirs[family], data_file, tmp_path, router_aux_loss_coef=coefficient, gradient_checkpointing=recomputed
    )
    balanced = () if coefficient == 0 else ("aux_loss",)
    assert ("aux_loss" in trl_run.log_history[0]) == bool(balanced)
    assert_same_trajectory(tmp_path / "run", trl_run, METRICS + TOKEN_METRICS + balanced)
    assert_same_weights(tmp_path / "run", trl_run.final_weights)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["experts/idlest"] < row["experts/busiest"] < 1 for row in rows)


def test_two_processes_equal_one_of_trl(model_dirs, data_file, tmp_path):
    """Sums of routers are those of all processes."""
    sections = {"loss": {"router_aux_loss_coef": COEFFICIENT}, "packing": {"tokens_per_pack": 200}}
    config = make_config(model_dirs["mixtral"], data_file, tmp_path, **sections)
    for process in run_jobs(tmp_path, 2, [{"kind": "train", "config": to_dict(config), "resume": False}]):
        assert process.code == 0, process.err[-2000:]
    trl_run = run_trl(model_dirs["mixtral"], data_file, tmp_path, router_aux_loss_coef=COEFFICIENT)
    assert_same_trajectory(tmp_path / "run", trl_run, METRICS + TOKEN_METRICS + ("aux_loss",))
    assert_same_weights(tmp_path / "run", trl_run.final_weights)


def assert_same_weights(output_dir: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Files have single experts, memory has them stacked."""
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    for name, found in model.named_parameters():
        torch.testing.assert_close(found.detach(), wanted[name], atol=2e-4, rtol=0)
