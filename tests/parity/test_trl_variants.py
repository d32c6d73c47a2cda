"""Twenty optimizer steps beside TRL with adapters, accumulation, checkpointing and two processes, on a tiny model.

The values are compared as in ``test_trl_trajectory``: within 1e-4 of the largest magnitude of a metric in TRL's run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from benchmarks.trl_peer import TrlRun, train_with_trl
from engine.config import build_config, to_dict
from engine.config.schema import RunConfig
from engine.train.loop import train
from engine.train.setup import prepare
from tests.engine.conftest import build_tokenizer, preference_rows
from tests.engine.distributed.launch import run_jobs
from tests.parity.test_trl_trajectory import METRICS, RELATIVE, STEPS, TOKEN_METRICS

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

PAIRS = 6
LEARNING_RATE = 5e-3
LORA = {"r": 4, "alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
SMALL_PACKS = {"tokens_per_pack": 250}

VARIANTS: dict[str, dict[str, Any]] = {
    "accumulation": {"trl": {"micro_batches": 3}, "packing": SMALL_PACKS},
    "checkpointing": {"trl": {"gradient_checkpointing": True}, "train": {"gradient_checkpointing": True}},
    "lora": {"lora": LORA},
    "all at once": {
        "lora": LORA,
        "trl": {"micro_batches": 3, "gradient_checkpointing": True},
        "packing": SMALL_PACKS,
        "train": {"gradient_checkpointing": True},
    },
}

OPTIONS: dict[str, dict[str, Any]] = {
    "the tail of the longer response counts less": {"ld_alpha": 0.3},
    "and nothing, beside a likelihood": {"ld_alpha": 0.0, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5]},
    "per token": {"ld_alpha": 0.5, "loss_type": "sigmoid_norm"},
    "pairs weighed by their probability": {"use_weighting": True},
    "weighed, with a tail that counts less": {"use_weighting": True, "ld_alpha": 0.5, "loss_type": "ipo"},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"f_divergence_type": "js_divergence", "loss_type": "sigmoid_norm"},
    "alpha-divergence": {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.7,
        "loss_type": "robust",
    },
}
"""Keys of ``loss`` under TRL's names."""
PAIRWISE = {
    **{"hinge": 1.0, "ipo": 0.02, "exo_pair": 1.0, "nca_pair": 1.0, "robust": 0.5, "bco_pair": 0.7, "sppo_hard": 0.01},
    **{"apo_zero": 1.0, "apo_down": 0.5, "discopop": 0.8, "sigmoid_norm": 0.6, "sft": 0.3},
}
"""Losses of TRL that take pairs alone, with weights that leave each its part."""
OPTIONS["every other loss of pairs"] = {
    **{"loss_type": list(PAIRWISE), "loss_weights": list(PAIRWISE.values())},
    **{"label_smoothing": 0.1, "discopop_tau": 0.1, "beta": 0.2},
}
OPTIONS["losses that couple pairs"] = {
    **{"loss_type": ["aot", "aot_unpaired"], "loss_weights": [0.4, 1.0], "label_smoothing": 0.1},
}
GENTLE = {"forward KL", "alpha-divergence"}
"""Their scores are exponentials: at the full learning rate gradients of hundreds carry rounding along."""


@pytest.fixture(scope="module", autouse=True)
def _assumed_peak():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(STEPS * PAIRS)))
    return path


@pytest.fixture
def make_config(model_dir: Path, data_file: Path, tmp_path: Path):
    """The engine's counterpart of a TRL run."""

    def make(variant: dict[str, Any]) -> RunConfig:
        model = {"model_name_or_path": str(model_dir), "dtype": "float32", "lora": variant.get("lora")}
        sections = {
            "model": {**model, **variant.get("model", {})},
            "data": {"dataset_name": str(data_file), "max_length": 160},
            "packing": {"pairs_per_step": PAIRS, "shuffle": False, **variant.get("packing", {})},
            "loss": variant.get("loss", {}),
            "optim": {"learning_rate": variant.get("learning_rate", LEARNING_RATE)},
            "reference": {"store": str(tmp_path / "store"), **variant.get("reference", {})},
            "train": {
                **{"output_dir": str(tmp_path / "run"), "max_steps": STEPS, "logging_steps": 1, "report_to": []},
                **variant.get("train", {}),
            },
        }
        return build_config(sections, "test")

    return make


def run_trl(model_dir: Path, data_file: Path, work_dir: Path, **options: Any) -> TrlRun:
    return train_with_trl(
        model_dir,
        data_file,
        work_dir,
        pairs_per_step=PAIRS,
        max_steps=STEPS,
        max_length=160,
        **{"learning_rate": LEARNING_RATE, **options},
    )


def assert_same_trajectory(output_dir: Path, trl_run: TrlRun, names: tuple[str, ...] = METRICS + TOKEN_METRICS) -> None:
    ours = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    theirs = trl_run.log_history
    assert len(ours) == len(theirs) == STEPS
    for name in names:
        got, want = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for rows in (ours, theirs))
        assert want.abs().max() > 0
        worst = ((got - want).abs().max() / want.abs().max()).item()
        assert worst <= RELATIVE, f"{name}: {worst:.2e} relative to its largest value"
    # Before the first update every margin is 0 up to rounding, so its sign means nothing.
    got, want = ([row["rewards/accuracies"] for row in rows[1:]] for rows in (ours, theirs))
    assert got == pytest.approx(want, abs=1e-6)
    assert [row["num_tokens"] for row in ours] == [row["num_tokens"] for row in theirs]


def assert_same_adapter(output_dir: Path, trl_run: TrlRun) -> None:
    found = load_file(output_dir / "adapter_model.safetensors")
    wanted = {n.replace(".default", ""): p for n, p in trl_run.final_weights.items() if ".default." in n}
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, atol=2e-4, rtol=0)


def _fresh_adapter(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What TRL trains for ``model.lora`` of ``config``, with the values that our run starts with.

    TRL draws other numbers before it makes its adapter.
    """
    prepare(config).policy.model.save_pretrained(folder / "initial", save_embedding_layers=False)
    lora = {"r": LORA["r"], "lora_alpha": LORA["alpha"], "target_modules": LORA["target_modules"]}
    return {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", **lora), "adapter_dir": folder / "initial"}


@pytest.mark.parametrize("name", VARIANTS)
def test_twenty_steps_equal_trl(name, make_config, model_dir, data_file, tmp_path):
    variant = VARIANTS[name]
    config = make_config(variant)
    options = dict(variant.get("trl", {}))
    if config.model.lora:
        options |= _fresh_adapter(config, tmp_path)
    train(config)
    trl_run = run_trl(model_dir, data_file, tmp_path, **options)
    # TRL's means over tokens are of micro-batches of its own; ours, of any packs, are those of the whole step.
    accumulates = options.get("micro_batches", 1) > 1
    assert_same_trajectory(tmp_path / "run", trl_run, METRICS + (() if accumulates else TOKEN_METRICS))
    losses = [row["loss"] for row in trl_run.log_history]
    assert min(losses) < 0.9 * losses[0], "the runs must move for their equality to mean anything"
    if config.model.lora:
        assert_same_adapter(tmp_path / "run", trl_run)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_loss_equal_trl(name, make_config, model_dir, data_file, tmp_path):
    options, learning_rate = OPTIONS[name], LEARNING_RATE / 5 if name in GENTLE else LEARNING_RATE
    train(make_config({"loss": options, "packing": SMALL_PACKS, "learning_rate": learning_rate}))
    types = options.get("loss_type", "sigmoid")
    theirs = {**options, "loss_type": types if isinstance(types, list) else [types], "learning_rate": learning_rate}
    trl_run = run_trl(model_dir, data_file, tmp_path, **theirs)
    assert_same_trajectory(tmp_path / "run", trl_run)
    losses = [row["loss"] for row in trl_run.log_history]
    assert abs(min(losses) - losses[0]) > 0.05 * abs(losses[0]), (
        "the runs must move for their equality to mean anything"
    )


MOVES = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 3}


def test_a_reference_that_moves_equals_trl(make_config, model_dir, data_file, tmp_path, monkeypatch):
    from trl.trainer.callbacks import SyncRefModelCallback

    mix, shares = SyncRefModelCallback._sync_target_model, []

    def counted(model, target, share):
        shares.append(share)
        mix(model, target, share)

    monkeypatch.setattr(SyncRefModelCallback, "_sync_target_model", staticmethod(counted))
    train(make_config({"packing": SMALL_PACKS, "reference": MOVES}))
    trl_run = run_trl(model_dir, data_file, tmp_path, precompute=False, **MOVES)
    assert_same_trajectory(tmp_path / "run", trl_run)
    assert shares == [0.3] * (STEPS // 3)


def test_every_loss_of_trl_has_a_run():
    from trl import DPOConfig

    _, _, text = DPOConfig.__doc__.partition("loss_type (`list[str]`")
    named = re.findall(r"`'(\w+)'`", text.partition("loss_weights (`")[0])
    runs = {name for options in OPTIONS.values() for name in options.get("loss_type", ["sigmoid"])}
    runs |= {options["loss_type"] for options in OPTIONS.values() if isinstance(options.get("loss_type"), str)}
    assert len(named) >= 14
    assert set(named) <= runs


def test_a_continued_adapter_equals_trl(make_config, model_dir, data_file, tmp_path):
    """Both keep a frozen copy of the trained adapter as the reference."""
    config = make_config({"lora": LORA})
    policy = prepare(config).policy
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.model.save_pretrained(tmp_path / "trained", save_embedding_layers=False)
    train(make_config({"model": {"adapter_name_or_path": str(tmp_path / "trained")}}))
    trl_run = run_trl(model_dir, data_file, tmp_path, adapter_dir=tmp_path / "trained")
    assert_same_trajectory(tmp_path / "run", trl_run)
    assert_same_adapter(tmp_path / "run", trl_run)


def test_two_processes_equal_one_of_trl(make_config, model_dir, data_file, tmp_path):
    """Sharded training of all weights, of adapters, and beside a reference that moves, in one start of both."""
    runs = {"full": {}, "adapters": {"lora": LORA}, "moving": {"reference": MOVES}}
    configs = {
        name: make_config({**variant, "train": {"output_dir": str(tmp_path / name)}}) for name, variant in runs.items()
    }
    jobs = [{"kind": "train", "config": to_dict(config), "resume": False} for config in configs.values()]
    for process in run_jobs(tmp_path, 2, jobs):
        assert process.code == 0, process.err[-2000:]
    full = run_trl(model_dir, data_file, tmp_path / "trl-full")
    assert_same_trajectory(tmp_path / "full", full)
    weights = load_file(tmp_path / "full" / "model.safetensors")
    for name, want in full.final_weights.items():
        torch.testing.assert_close(weights[name], want, atol=2e-4, rtol=0)
    options = _fresh_adapter(configs["adapters"], tmp_path)
    adapters = run_trl(model_dir, data_file, tmp_path / "trl-adapters", **options)
    assert_same_trajectory(tmp_path / "adapters", adapters)
    assert_same_adapter(tmp_path / "adapters", adapters)
    moving = run_trl(model_dir, data_file, tmp_path / "trl-moving", precompute=False, **MOVES)
    assert_same_trajectory(tmp_path / "moving", moving)
