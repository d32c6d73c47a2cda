"""The lines that ``dpo plan`` adds for memory and time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from engine.config.schema import DataConfig, LoraConfig, LossConfig
from engine.data import load_dataset_groups
from engine.errors import UserError
from engine.forecast import Target, describe_forecast, text, trial
from engine.forecast.budget import Budget
from engine.model import load_policy
from engine.packing import plan_first_epoch
from engine.train.checkpoint import save_weights
from engine.train.mismatched import loss_groups
from engine.train.storage import disk_need
from tests.engine.conftest import preference_rows


@pytest.fixture
def dataset(config, tiny_tokenizer):
    return load_dataset_groups(config.data, tiny_tokenizer, split="train")[0]


def test_memory_by_part_and_time(config, dataset, monkeypatch):
    monkeypatch.setattr("engine.forecast.duration.measure_matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("engine.forecast.trial._measure", lambda *given: (given[3], 1e-9))
    lines = describe_forecast(dataset, config).splitlines()
    names = [line[:24].strip() for line in lines[-8:]]
    assert names == [
        "peak memory",
        "weights",
        "gradients",
        "optimizer state",
        "activations",
        "inside an op",
        "process",
        "time",
    ]
    assert "of the 1e+09 FLOP/s of matrix products here, as " in lines[-1]
    assert " tokens took in a trial, roughly: so small a step is mostly overhead; without start-up" in lines[-1]
    assert lines[0].startswith("preference groups")
    assert "of them reach the head; a prompt counts once a row" in lines[3]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_rows_that_are_each_desirable_or_not(loss_type, config, tiny_tokenizer, monkeypatch):
    """The pass for the divergence is forecast with that of the rows, and tried out."""
    monkeypatch.setattr("engine.forecast.duration.measure_matmul_rate", lambda device, dtype: 1e9)
    # The trial is made; how long it took must not matter.
    tried = trial._measure
    monkeypatch.setattr(trial, "_measure", lambda *given: (tried(*given), (given[3], 1e-9))[1])
    config = replace(config, loss=LossConfig(loss_type=loss_type))
    read, _ = load_dataset_groups(config.data, tiny_tokenizer, split="train", unpair=True)
    lines = describe_forecast(loss_groups(config, read, split="train"), config).splitlines()
    parts = {line[:24].strip(): line[24:].split() for line in lines}
    assert not [line for line in lines if "unknown" in line or "assumption" in line]
    assert parts["peak memory"][1] == "GiB"
    assert " ".join(parts["rows"]).startswith(f"{len(read)} 50% desirable")
    assert ("for the divergence" in lines[0]) == (loss_type == "kto")


@pytest.mark.parametrize(
    ("lora", "moves", "optim"),
    [
        (None, False, {}),
        (None, True, {}),
        (LoraConfig(r=4), False, {}),
        # State that is not on the device, and weights that are not as large as gradients.
        (None, False, {"offload": True, "master_weights": "kahan"}),
        (LoraConfig(r=4), False, {"optimizer": "paged_adamw"}),
    ],
)
def test_what_checkpoints_are_copied_to_is_what_they_hold(lora, moves, optim, config, dataset):
    target, train = Target.of_kind("cuda", 1), replace(config.train, async_save=True)
    dtype = "bfloat16" if "master_weights" in optim else "float32"
    config = replace(config, model=replace(config.model, lora=lora, dtype=dtype), train=train)
    config = replace(config, optim=replace(config.optim, **optim))
    config = replace(config, reference=replace(config.reference, sync_ref_model=moves))
    memory = text.forecast_memory(config, dataset, plan_first_epoch(dataset, config), target=target, resident=0)
    policy = load_policy(config.model, device=target.device, weights_dtype=config.optim.weights_dtype)
    assert memory.stored == disk_need(policy, config, done=0, total=6).checkpoint
    ((name, *_),) = text._copy_lines(memory, config, target)
    assert name == "copy for checkpoints"
    left, cpu = replace(config, train=replace(train, async_save=None)), Target.on(torch.device("cpu"))
    assert text._copy_lines(memory, left, cpu) == []
    assert text._copy_lines(memory, replace(config, train=replace(train, save_steps=None)), target) == []


def test_peak_is_tensors_and_process(config, dataset, monkeypatch):
    """``step_peak`` and what ``resident_bytes`` finds; the other parts are alive at other times."""
    gib = 2**30
    monkeypatch.setattr("engine.forecast.duration.measure_matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("engine.forecast.trial._measure", lambda *given: (given[3], 1e-9))
    monkeypatch.setattr(text, "resident_bytes", lambda config, device: gib // 2)
    forecast, tensors = text.forecast_memory, []

    def observed(*args, **kwargs):
        memory = forecast(*args, **kwargs)
        memory = replace(memory, step_peak=memory.step_peak + 3 * gib)
        tensors.append(memory.step_peak)
        return memory

    monkeypatch.setattr(text, "forecast_memory", observed)
    lines = describe_forecast(dataset, config).splitlines()
    found = {line[:24].strip(): line[24:].split()[0] for line in lines[-8:]}
    assert found["peak memory"] == f"{tensors[0] / gib + 0.5:.2f}"
    assert found["process"] == "0.50"


def test_another_device_and_what_fits_in_it(config, dataset):
    """Nothing is tried out for a CUDA device that is not there, and what computes attention is said."""
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    lines = describe_forecast(dataset, config, Target.of_kind("cuda", 4), room=2**34).splitlines()
    found = {line[:24].strip(): line[24:].split(maxsplit=2) for line in lines[-11:]}
    assert list(found) == [
        "peak memory",
        "on the device",
        "weights",
        "gradients",
        "optimizer state",
        "activations",
        "inside an op",
        "gathered",
        "copy for checkpoints",
        "fits 16.00 GiB",
        "time",
    ]
    assert "forecast without one; attention by varlen" in found["peak memory"][2]
    assert "4 processes" in found["weights"][2]
    assert "NCCL" in found["on the device"][2]
    assert "of host memory for each process" in found["copy for checkpoints"][2]
    assert "all pairs of a step in one pack" in found["fits 16.00 GiB"][1] + found["fits 16.00 GiB"][-1]
    assert found["time"][0] == "unknown"
    (short,) = [
        n for n in describe_forecast(dataset, config, Target.of_kind("cuda", 1), room=2**20).splitlines() if "fits" in n
    ]
    assert "nothing" in short
    assert "not even a pack of the longest row" in short


@pytest.mark.parametrize(
    ("whole_step", "asked", "words"),
    [
        (False, 512, "largest packing.tokens_per_pack"),
        (False, 65_536, "largest packing.tokens_per_pack: the run's 65,536 do not fit"),
        (True, 65_536, "largest packing.tokens_per_pack: all pairs of a step in one pack"),
    ],
)
def test_a_run_that_does_not_fit_is_told(whole_step, asked, words, config, dataset):
    steps = plan_first_epoch(dataset, config)
    memory = text.forecast_memory(config, dataset, steps, target=Target.of_kind("cpu", 1), resident=0)
    assert text._budget_line(Budget(512, whole_step, memory), 2**30, asked) == ("fits 1.00 GiB", "512", words)


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        (None, "4 processes holds its share"),
        (2, "2 processes holds its share of a copy"),
        (1, "whole on each of 4 processes"),
    ],
)
def test_what_each_process_holds_of_the_weights(shards, words, config, dataset):
    config = replace(config, train=replace(config.train, shards_per_replica=shards))
    (line,) = [
        n
        for n in describe_forecast(dataset, config, Target.of_kind("cuda", 4)).splitlines()
        if n.startswith("  weights")
    ]
    assert line.endswith(words)


@pytest.mark.parametrize(
    ("processes", "changes", "words"),
    [
        (2, {"shards_per_replica": 8}, "train.shards_per_replica=8 does not divide the 2 processes"),
        (2, {"context_parallel": 3}, "train.context_parallel=3 divides every pack over 3 processes"),
        (1, {"context_parallel": 2}, r"start a multiple of 2 with torchrun --nproc-per-node \(dpo plan: --processes\)"),
        (1, {"param_dtype": "bfloat16"}, r"set it to float32, or start several \(dpo plan: --processes\)"),
    ],
)
def test_what_processes_refuse_is_not_forecast(processes, changes, words, config, dataset):
    model = replace(config.model, dtype="bfloat16")
    config = replace(config, model=model, train=replace(config.train, **changes))
    with pytest.raises(UserError, match=words):
        describe_forecast(dataset, config, Target.of_kind("cuda", processes))


def test_a_model_that_does_not_run_without_data_leaves_the_rest(config, dataset, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("it looks at values\nsecond line")

    monkeypatch.setattr(text, "forecast_memory", fail)
    monkeypatch.setattr("engine.forecast.duration.measure_matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("engine.forecast.trial._measure", lambda *given: (given[3], 1e-9))
    memory, time = describe_forecast(dataset, config).splitlines()[-2:]
    assert memory.split(maxsplit=3)[:3] == ["peak", "memory", "unknown"]
    assert memory.endswith("the model does not run on shapes alone: it looks at values")
    assert " tokens took in a trial" in time
    monkeypatch.setattr(text, "work_of", fail)
    time = describe_forecast(dataset, config).splitlines()[-1]
    assert time.split(maxsplit=2)[:2] == ["time", "unknown"]
    assert time.endswith("the model is not built without its weights: it looks at values")


def test_an_assumed_time_says_so(config, dataset, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("layers come in pairs\nsecond line")

    monkeypatch.setattr("engine.forecast.duration.try_out", fail)
    last = describe_forecast(dataset, config).splitlines()[-1]
    assert " FLOP at 50% of the " in last
    assert ", an assumption (layers come in pairs); without start-up" in last


def test_a_trained_adapter_that_goes_on(config, dataset, tmp_path):
    pytest.importorskip("peft")
    lora = replace(config.model, lora=LoraConfig(r=4))
    save_weights(load_policy(lora, device=torch.device("cpu")), tmp_path)
    continued = replace(config, model=replace(config.model, adapter_name_or_path=str(tmp_path)))
    found = [describe_forecast(dataset, c).splitlines() for c in (replace(config, model=lora), continued)]
    fresh, again = ([line.split()[0] for line in lines] for lines in found)
    assert fresh == again
    trained = [next(line for line in lines if line.startswith("  gradients")) for lines in found]
    assert trained[0].split() == trained[1].split()


def test_pairs_that_the_loss_does_not_take_are_refused(config, tmp_path, tiny_tokenizer):
    row = {"prompt": "Tell me.", "responses": [" bad", " best", " fair"], "scores": [1, 3, 2]}
    (tmp_path / "scored.json").write_text(json.dumps([row]))
    scored = replace(
        config, data=DataConfig(dataset_name=str(tmp_path / "scored.json")), loss=LossConfig(loss_type="aot")
    )
    dataset = load_dataset_groups(scored.data, tiny_tokenizer, split="train")[0]
    with pytest.raises(UserError, match="does not take several pairs of one prompt"):
        describe_forecast(dataset, scored)


def test_numbers_of_rows_are_in_the_plan(config, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("engine.forecast.duration.measure_matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("engine.forecast.trial._measure", lambda config, batch, device, layers: (layers, 1e-9))
    rows = [{**row, "weight": 1 + i, "margin": 0.5} for i, row in enumerate(preference_rows(3))]
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, data=DataConfig(dataset_name=str(path), mask_pattern="no"))
    dataset = load_dataset_groups(config.data, tiny_tokenizer, split="train")[0]
    (line,) = [line for line in describe_forecast(dataset, config).splitlines() if line.startswith("rows ")]
    assert "weight 1 to 3; margin 0.5 to 0.5; " in line
    assert "% of completion tokens left out" in line
