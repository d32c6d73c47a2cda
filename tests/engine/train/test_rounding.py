"""The dtype of the final model: nothing is lost by default, and what rounding costs is measured on what is written."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine import stop
from engine.digits import figures
from engine.evaluate import evaluate
from engine.report.page import _evaluation
from engine.report.records import read_run
from engine.run_folder import AS_TRAINED
from engine.train.loop import train
from engine.train.rounding import round_weights, rounded
from engine.train.storage import dtypes_of
from tests.conformance.families import tiny_config, tiny_model
from tests.engine.conftest import preference_rows
from tests.engine.exported import assert_written_is_measured

KEPT = ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "beam", "flint", "gpt_oss", "llama")
"""Families that keep a correction bias, a router, or sinks in float32; the last two keep nothing so."""
KNOWN = [family for family in KEPT if family in CONFIG_MAPPING]
"""Those that this version of transformers has."""
SMALL = {"optim": {"learning_rate": 1e-4}}
"""Updates that are smaller than most steps of bfloat16."""
NEEDS = {"qlora": "bitsandbytes", "lora": "peft"}

RUNS = {
    "full": {},
    "tied": {"model": {"model_name_or_path": "TIED"}},
    "experts": {"model": {"model_name_or_path": "EXPERTS"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "lora": {"model": {"lora": {"r": 4}}},
    "qlora": {"model": {"lora": {"r": 4}, "quantization": "nf4"}},
    "lora bfloat16": {"model": {"lora": {"r": 4}, "dtype": "bfloat16"}},
    "rounded": {"train": {"save_dtype": "bfloat16"}},
    "rounded experts": {"model": {"model_name_or_path": "EXPERTS"}, "train": {"save_dtype": "bfloat16"}},
    "rounded at random": {"train": {"save_dtype": "bfloat16", "save_rounding": "stochastic"}},
    "rounded adapter": {"model": {"lora": {"r": 4}}, "train": {"save_dtype": "bfloat16"}},
}


@pytest.fixture(scope="module")
def eval_jsonl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(6, seed=5)))
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_model_dir, tiny_tokenizer) -> dict[str, str]:
    """Special base models by name, with the tokenizer; the tied one is stored in bfloat16, as published ones are."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(3)
    made = {
        "TIED": LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)),
        "EXPERTS": tiny_experts(len(tiny_tokenizer)),
    }
    made["TIED"].bfloat16()
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def tiny_experts(vocab_size: int) -> torch.nn.Module:
    """A DeepSeek-V3 whose correction biases lie closer together than numbers of bfloat16 do."""
    config = tiny_config("deepseek_v3")
    config.vocab_size, config.max_position_embeddings = vocab_size, 512
    model = tiny_model(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(5 + 1e-3 * torch.arange(len(buffer)))
    return model


@pytest.fixture
def run_of(make_config, bases, eval_jsonl, tmp_path):
    """``run_of(name)``: a finished run of ``RUNS``."""

    def run(name: str, **changes: dict):
        wanted = RUNS[name]
        sections = {key: {**wanted.get(key, {}), **changes.get(key, {})} for key in {*wanted, *changes}}
        model = dict(sections.get("model", {}))
        if "model_name_or_path" in model:
            model["model_name_or_path"] = bases[model["model_name_or_path"]]
        config = make_config(**{"data": {"eval_dataset_name": str(eval_jsonl)}, **SMALL, **sections, "model": model})
        return config, train(config)

    return run


@pytest.mark.parametrize("name", RUNS)
def test_the_model_that_was_measured_is_the_model_that_is_written(name, run_of, tmp_path):
    pytest.importorskip(NEEDS.get(name.split()[0], "torch"))
    config, _ = run_of(name)
    run = tmp_path / "run"
    assert_written_is_measured(run)
    written = json.loads((run / "evaluation.json").read_text())
    again = evaluate(config, str(run))
    assert {key: value for key, value in written.items() if not key.startswith(AS_TRAINED)} == again
    # What was measured before rounding cannot be measured again.
    assert json.loads((run / "evaluation.json").read_text()) == written
    dtypes = {tensor.dtype for file in run.glob("*.safetensors") for tensor in load_file(file).values()}
    kept = {torch.float32} if "experts" in name or "rounded" not in name else set()
    assert dtypes == kept | ({torch.bfloat16} if "rounded" in name else set())


def test_the_default_keeps_what_bfloat16_training_learned(run_of, tmp_path):
    run_of("bfloat16", train={"save_steps": 4})
    final, trained = (load_file(tmp_path / "run" / p / "model.safetensors") for p in ("", "checkpoint-4"))
    assert all(torch.equal(final[name], tensor) for name, tensor in trained.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32


def test_rounding_is_measured_and_told(run_of, tmp_path, caplog):
    _, exact = run_of("full", train={"output_dir": str(tmp_path / "exact")})
    with caplog.at_level("INFO"):
        _, result = run_of("rounded")
    run = tmp_path / "run"
    written = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    margin = "eval_rewards/margins"
    trained = exact.metrics[margin]
    assert written[AS_TRAINED + "rewards/margins"] == trained != written[margin]
    assert [row[margin] for row in rows if margin in row] == [trained, written[margin]]
    assert result.metrics[margin] == rows[-1][margin] == written[margin]
    told = f"margin {trained:.6g} as trained and {written[margin]:.6g} as written"
    card = (run / "README.md").read_text()
    for text in (caplog.text, card):
        assert told in text
        assert "6 held-out pairs" in text
    for name in (margin, f"{AS_TRAINED}rewards/margins"):
        assert f"| `{name}` | {figures(written)[name]} |" in card
    assert "as written" not in (tmp_path / "exact" / "README.md").read_text()
    table = _evaluation(read_run(run))
    assert "as_trained/rewards/margins" in [row["name"] for row in table["rows"]]


def test_without_evaluation_data_rounding_is_measured_on_training_rows(run_of, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run_of("rounded", data={"eval_dataset_name": None})
    assert not (tmp_path / "run" / "evaluation.json").exists()
    for text in (caplog.text, (tmp_path / "run" / "README.md").read_text()):
        assert "as written" in text
        assert "24 pairs of the training data" in text


def test_a_run_that_is_asked_to_end_while_it_measures_rounded_weights_writes_its_model(run_of, tmp_path, monkeypatch):
    def round_and_ask(policy, config):
        round_weights(policy, config)
        monkeypatch.setattr(stop._state, "request", signal.SIGTERM)

    monkeypatch.setattr("engine.train.rounding.round_weights", round_and_ask)
    run_of("rounded")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.bfloat16
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


def test_rounding_at_random_keeps_the_sum_of_updates_that_rounding_to_nearest_loses():
    torch.manual_seed(0)
    start = (0.02 * torch.randn(1 << 20)).bfloat16().float()
    update = 1e-6 * (1 + torch.rand(1 << 20))
    kept = {
        name: ((rounded(start + update, generator) - start).double().sum() / update.double().sum()).item()
        for name, generator in (("nearest", None), ("stochastic", torch.Generator().manual_seed(0)))
    }
    assert kept["stochastic"] == pytest.approx(1, abs=0.02)
    assert kept["nearest"] < 0.5


def test_rounding():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(2000), torch.tensor([0.0, 1.0, -2.5])])
    towards_zero = values.view(torch.int32) & -(1 << 16)
    lower, upper = (bits.view(torch.float32) for bits in (towards_zero, towards_zero + (1 << 16)))
    assert torch.equal(rounded(values), values.bfloat16().float())
    many = torch.stack([rounded(values, torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert ((many == lower) | (many == upper)).all()
    exact = values == lower
    assert (many[:, exact] == values[exact]).all()
    # Five standard deviations of the mean of 400 draws.
    assert ((many.mean(0) - values).abs() <= 5 * 0.5 / 400**0.5 * (upper - lower).abs()).all()
    assert torch.equal(rounded(values, torch.Generator().manual_seed(1)), many[1])
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), torch.finfo(torch.bfloat16).max])
    found = rounded(special, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, special, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", KNOWN)
def test_dtypes_are_those_that_transformers_loads(family, tmp_path):
    model = tiny_model(tiny_config(family))
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        wanted = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
        assert dtypes_of(loaded, dtype) == wanted
        assert dtypes_of(model, dtype) == wanted
