from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.config.schema import LoraConfig, ModelConfig
from engine.data.groups import PreferenceGroup
from engine.data.lengths import GroupLengths
from engine.model import load_policy
from engine.model.checks import has_experts
from engine.packing import build_batch
from engine.train.throughput import FlopModel, Stopwatch, measure_matmul_rate, peak_memory_gib
from tests.conformance.families import tiny_config
from tests.conformance.families import tiny_model as model_of
from tests.engine.model.test_attention import make_policy

CPU = torch.device("cpu")


def groups() -> list[PreferenceGroup]:
    generator = np.random.default_rng(0)

    def draw(size: int) -> np.ndarray:
        return generator.integers(0, 300, size, dtype=np.int32)

    return [PreferenceGroup(i, draw(20), (draw(9), draw(14))) for i in range(3)]


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
def test_flop_model_counts_the_matrix_products_that_torch_counts(tiny_model_dir, lora):
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32", lora=lora), device=CPU)
    batch = build_batch(groups())

    def cross_entropy(hidden, head):
        return torch.nn.functional.cross_entropy(hidden @ head.weight_VD.T, batch.labels_N)

    with FlopCounterMode(display=False) as counter:
        policy(batch, cross_entropy).backward()
    by_op = {name: n for name, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)}
    pairs = int(GroupLengths.of([np.array([20, 9, 14])] * 3).visible_pairs(share_prompts=True).sum())
    model = FlopModel.of(policy)
    expected = model.step(batch.num_tokens, len(batch.labels_N), pairs) - 12.0 * model.attention_width * pairs
    # The first layer's input needs no gradient without LoRA, which the model counts all the same.
    assert sum(by_op.values()) == pytest.approx(expected, rel=0.12)
    assert sum(by_op.values()) <= expected * 1.001


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4_text", "qwen2_moe", "llama4_text"])
def test_attention_width_is_that_of_the_layers(family):
    policy = make_policy(model_of(tiny_config(family)))
    width = sum(m.out_features for n, m in policy.causal_lm.named_modules() if n.endswith("q_proj"))
    assert FlopModel.of(policy).attention_width == width
    assert has_experts(policy.config) == (family in ("qwen2_moe", "llama4_text"))


def test_measures_are_plausible():
    assert 1e8 < measure_matmul_rate(CPU, torch.float32) < 1e15
    assert 0.01 < peak_memory_gib(CPU) < 1000


@pytest.mark.parametrize("slow", ["mm", "linear", "bfloat16"])
def test_the_peak_is_that_of_the_fastest_product_of_a_run(slow, monkeypatch):
    """What the CPU computes in bfloat16 may be slow by one call and not another, and slower than float32."""
    clock = [0.0]

    def timed(call, name):
        def run(a, b):
            clock[0] += 2.0 if slow in (name, str(a.dtype).removeprefix("torch.")) else 0.125
            return call(a, b)

        return run

    monkeypatch.setattr("engine.train.throughput.time.perf_counter", lambda: clock[0])
    for owner, name in ((torch, "mm"), (torch.nn.functional, "linear")):
        monkeypatch.setattr(owner, name, timed(getattr(owner, name), name))
    assert measure_matmul_rate(CPU, torch.bfloat16) == 2.0 * 1024**3 / 0.125


def test_peak_memory_is_that_of_the_process_alone():
    """Not that of the one which started it, and with what was given back."""
    held = np.ones(2**30, dtype=np.uint8)
    code = (
        "import numpy as np, torch; from engine.train.throughput import *; cpu = torch.device('cpu'); "
        "print(peak_memory_gib(cpu)); np.ones(2**29, dtype=np.uint8); print(peak_memory_gib(cpu))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, child.stdout.split())
    assert before < peak_memory_gib(CPU) - 0.25
    # Pages of files may have been dropped in between, so that the peak rises by less than the block.
    assert 0.5 < after < before + 0.55
    assert held.all()


def test_peak_memory_in_gib(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("VmPeak: 9000000 kB\nVmHWM:\t 1572864 kB\nVmRSS: 1000 kB\n")
    monkeypatch.setattr("engine.train.throughput._STATUS", tmp_path / "status")
    assert peak_memory_gib(CPU) == 1.5


def test_a_system_that_does_not_tell_its_peak(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("Name: python\nVmRSS: 1000 kB\n")
    monkeypatch.setattr("engine.train.throughput._STATUS", tmp_path / "status")
    assert 0.01 < peak_memory_gib(CPU) < 1000


def test_stopwatch_leaves_out_what_lies_between(monkeypatch):
    clock = iter([10.0, 12.0, 100.0, 103.0, 104.0])
    monkeypatch.setattr("engine.train.throughput.time.perf_counter", lambda: next(clock))
    watch = Stopwatch(CPU)
    watch.start()
    watch.stop()
    assert watch.seconds() == 2.0
    watch.start()
    assert watch.seconds() == 5.0
    watch.stop()
    assert watch.seconds() == 6.0
