"""Running out of memory, anywhere in a run, ends in one line with what to lower and what was forecast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import is_fake

from engine import cli
from engine.config import to_yaml
from engine.config.schema import LoraConfig
from engine.data import load_dataset_groups
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.forecast import Target, advice
from engine.forecast.advice import GIB, advise, forecast_run
from engine.memory_errors import remedies
from engine.packing import plan_first_epoch
from engine.precompute import check_columns, fill_store
from engine.train import loop, run, training_data
from engine.train.optimizer import GuardedUpdate
from engine.train.setup import prepare
from tests.engine.distributed.launch import launch

HERE = Target.on(torch.device("cpu"))


@pytest.fixture
def run_file(config, tmp_path):
    path = tmp_path / "run.yaml"
    values = to_yaml(config).replace("output_dir: runs/default", f"output_dir: {tmp_path / 'run'}")
    path.write_text(values.replace("store: null", f"store: {tmp_path / 'store'}"))
    return path


def fails(error):
    def raising(*arguments, **options):
        raise error

    return raising


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "GPU memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "GPU memory"),
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), "memory"),
    ],
    ids=["cuda", "cuda driver", "python", "cpu"],
)
@pytest.mark.parametrize(("owner", "name"), [(GuardedUpdate, "step"), (run, "export_model")], ids=["step", "end"])
def test_a_training_run_says_what_was_forecast_and_what_to_lower(
    owner, name, error, memory, run_file, monkeypatch, capsys
):
    monkeypatch.setattr(owner, name, fails(error))
    assert cli.main(["train", str(run_file)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: out of {memory} (forecast ")
    assert "optimizer state 0.0" in line
    assert "GiB): lower packing.tokens_per_pack (now 512), set train.gradient_checkpointing to true" in line
    assert line.endswith("or train an adapter (model.lora)")


@pytest.mark.parametrize("command", ["precompute", "evaluate"])
def test_a_pass_without_gradients_says_what_to_lower(command, run_file, pairs_jsonl, monkeypatch, capsys):
    monkeypatch.setattr("engine.model.policy.Policy.logps", fails(torch.OutOfMemoryError("CUDA out of memory")))
    evaluation = ["--data.eval_dataset_name", str(pairs_jsonl), "--data.eval_dataset_split", "train"]
    assert cli.main([command, str(run_file), *evaluation]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: out of GPU memory: lower packing.tokens_per_pack (now 512), or use more processes")


@pytest.mark.parametrize("call", [loop.train, evaluate, fill_store, check_columns], ids=lambda call: call.__name__)
def test_calls_from_python_are_told_the_same(call, config, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    for name in ("engine.train.loop.prepare", "engine.evaluate.load_tokenizer", "engine.precompute.load_tokenizer"):
        monkeypatch.setattr(name, fails(error))
    data = replace(config.data, eval_dataset_name=config.data.dataset_name)
    config = replace(config, data=data, train=replace(config.train, output_dir=str(tmp_path / "run")))
    with pytest.raises(UserError) as caught:
        call(config)
    assert str(caught.value) == "out of GPU memory: " + remedies(config, trains=call is loop.train)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_several_processes_say_it_once(ranks, run_file):
    code = f"""
RANKS = {ranks}
import torch
from engine import cli, distributed
from engine.train.optimizer import GuardedUpdate
def step(self, loss):
    if distributed.rank() in RANKS:
        raise torch.OutOfMemoryError("CUDA out of memory")
    distributed.barrier()
GuardedUpdate.step = step
distributed.leave(cli.main(["train", {str(run_file)!r}]))
"""
    ended = launch([["-c", code]] * 2)
    assert [process.code for process in ended] == [2, 2]
    (line,) = [line for process in ended for line in process.err.splitlines() if "out of" in line]
    assert " GiB in each of 2 processes (weights " in line


def test_what_will_not_fit_is_said_before_it_is_tried(config, tiny_tokenizer, monkeypatch, caplog):
    dataset = load_dataset_groups(config.data, tiny_tokenizer, split="train")[0]
    memory = forecast_run(config, dataset, HERE)
    with caplog.at_level("INFO", logger="engine"):
        advise(config, memory, HERE)
        monkeypatch.setattr(advice, "capacity", lambda device: int(memory.peak * 0.99))
        advise(config, memory, HERE)
    fits, short = (record.message for record in caplog.records)
    assert fits.startswith(f"memory: forecast {memory.peak / GIB:.1f} GiB (weights ")
    assert "may not fit" not in fits
    assert short.endswith("it may not fit; " + remedies(config))


def test_a_run_in_rows_is_forecast_in_rows(config, tiny_tokenizer, monkeypatch):
    """Padding is computed there: the same groups take more than in packs."""
    dataset = load_dataset_groups(config.data, tiny_tokenizer, split="train")[0]
    rows = replace(config, packing=replace(config.packing, layout="rows"))
    seen = []
    forecast = advice.forecast_memory

    def observed(config, *arguments, layout, **options):
        seen.append((layout.kind, config.packing.share_prompts))
        return forecast(config, *arguments, layout=layout, **options)

    monkeypatch.setattr(advice, "forecast_memory", observed)
    found = [forecast_run(c, dataset, HERE) for c in (config, rows)]
    assert seen == [("shared", True), ("rows", False)]
    assert found[1].activations > found[0].activations


def test_the_attention_backend_is_chosen_on_real_tensors(config, tiny_tokenizer, monkeypatch):
    """Tried on tensors without data every kernel works, and what was found is kept for the run."""
    from engine.forecast import memory
    from engine.model.attention import choice

    dataset = load_dataset_groups(config.data, tiny_tokenizer, split="train")[0]
    fake = []
    obstacle = choice._obstacle

    def spy(*arguments):
        fake.append(is_fake(torch.empty(1)))
        return obstacle(*arguments)

    monkeypatch.setattr(choice, "_obstacle", spy)
    memory.forecast_memory(config, dataset, plan_first_epoch(dataset, config), target=HERE, resident=0)
    assert fake[0] is False


def test_a_forecast_leaves_random_numbers_and_results_alone(config, tiny_tokenizer, tmp_path, monkeypatch):
    """On a CUDA device it is made before the model is loaded, whose adapters start from random numbers."""
    monkeypatch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
    config = replace(
        config,
        model=replace(config.model, lora=LoraConfig(r=2)),
        reference=replace(config.reference, store=str(tmp_path / "store")),
    )
    plain = prepare(config).policy.state_dict()
    resolve = training_data.load_dataset_groups

    def forecasting(*arguments, **options):
        found = resolve(*arguments, **options)
        torch.rand(7)
        return found

    monkeypatch.setattr(training_data, "load_dataset_groups", forecasting)
    again = prepare(config).policy.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
