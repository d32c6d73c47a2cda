"""The forecast of peak memory beside what runs measure, and its parts beside counts on real tensors."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from dpo_kernels import linear_logps
from dpo_kernels.linear_dpo import torch_chunks as dpo_chunks
from dpo_kernels.linear_logps import torch_chunks as logps_chunks
from engine.forecast.heap import Heap
from engine.forecast.live_storage import LiveStorage, is_op

CPU = torch.device("cpu")
ALLOWED = 0.15
LARGE = {"hidden_size": 512, "num_hidden_layers": 6, "vocab_size": 16384, "tie_word_embeddings": True}
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 8192}
WIDE = {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 32768}
LORA = "lora: {r: 16}, "
FAST = {"full": (SMALL, "dtype: float32", 4096, ""), "lora": (LARGE, LORA + "dtype: float32", 2048, "")}
SLOW = {
    "full, tied": (LARGE, "dtype: float32", 2048, ""),
    "full, wide": (WIDE, "dtype: float32", 1024, ""),
    "bfloat16": (LARGE, "dtype: bfloat16", 2048, ""),
    "lora, bfloat16": (LARGE, LORA + "dtype: bfloat16", 2048, ""),
    "checkpointing": (WIDE, "dtype: float32", 8192, ", gradient_checkpointing: true"),
}


def save_model(path, tokenizer, hidden_size, **options):
    set_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        max_position_embeddings=4096,
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def save_rows(path):
    rng = random.Random(0)

    def text():
        return " ".join(rng.choice(["the", "lamp", "sea", "river", "house"]) for _ in range(rng.randint(5, 60)))

    rows = [{"prompt": f"Q {i} {text()}?", "chosen": f" {text()}", "rejected": f" {text()}"} for i in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def dpo(*arguments):
    command = [sys.executable, "-m", "engine.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def forecast_and_measure(folder, tokenizer, case):
    """GiB that ``dpo plan`` forecasts, and that ``dpo train`` measures over two steps."""
    model, settings, tokens, train = case
    save_model(folder / "model", tokenizer, **model)
    save_rows(folder / "rows.jsonl")
    (folder / "run.yaml").write_text(
        f"model: {{model_name_or_path: {folder}/model, {settings}}}\n"
        f"data: {{dataset_name: {folder}/rows.jsonl}}\n"
        f"packing: {{pairs_per_step: 16, tokens_per_pack: {tokens}}}\n"
        f"reference: {{store: {folder}/store}}\n"
        f"train: {{output_dir: {folder}/run, max_steps: 2, logging_steps: 1, report_to: []{train}}}\n"
    )
    lines = dpo("plan", folder / "run.yaml").splitlines()
    forecast = next(line.split()[2] for line in lines if line.startswith("peak memory"))
    dpo("train", folder / "run.yaml")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return float(forecast), max(row["perf/peak_memory_gib"] for row in rows)


def check(folder, tokenizer, case):
    forecast, measured = forecast_and_measure(folder, tokenizer, case)
    print(f"forecast {forecast:.2f} GiB, measured {measured:.2f} GiB")
    assert abs(forecast - measured) <= ALLOWED * measured


@pytest.mark.skipif(not Heap.available(), reason="needs glibc 2.33, whose heap is asked")
@pytest.mark.parametrize("case", FAST)
def test_peak_is_what_a_run_measures(case, tmp_path, plain_tokenizer):
    if case == "lora":
        pytest.importorskip("peft")
    check(tmp_path, plain_tokenizer, FAST[case])


@pytest.mark.slow
@pytest.mark.skipif(not Heap.available(), reason="needs glibc 2.33, whose heap is asked")
@pytest.mark.parametrize("case", SLOW)
def test_peak_is_what_a_run_measures_with_other_settings(case, tmp_path, plain_tokenizer):
    check(tmp_path, plain_tokenizer, SLOW[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pairs", "length"), [(16, 60), (1, 1500)])
def test_workspace_of_the_head(dtype, pairs, length, monkeypatch):
    """Bytes that an implementation says it holds, and those that are alive while it runs."""
    D, V = 64, 4000
    monkeypatch.setattr(dpo_chunks, "BUFFER_BYTES", 2**23)
    hidden, weight = torch.randn(2 * pairs * length, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    labels = torch.randint(V, (len(hidden),))
    offsets = list(range(0, len(hidden) + 1, length))
    options = (None, None, 1.0, 1.0, -100)

    def score_pairs(sums, first):
        return sums[0::2], sums

    score_pairs.cu_S1 = torch.tensor(offsets)
    with LiveStorage(CPU, lambda func, args: 0) as count:
        dpo_chunks.forward(hidden, weight, labels, offsets, score_pairs, *options, True, True, False)
    stated = dpo_chunks.forward_workspace(hidden, weight, offsets, need_weight=True)
    results = (hidden.numel() + weight.numel()) * dtype.itemsize
    assert count.peak == pytest.approx(stated + results, abs=3 * 2**20)
    with LiveStorage(CPU, lambda func, args: 0) as count:
        logps_chunks.forward(hidden, weight, labels, *options, True, (), False)
    stated = logps_chunks.forward_workspace(hidden, weight, need_dx=True)
    assert count.peak == pytest.approx(stated + hidden.numel() * dtype.itemsize, abs=3 * 2**20)


def test_live_storages_are_counted_once_and_until_they_are_freed():
    layer = nn.Linear(256, 256, bias=False)
    size = 256 * 256 * 4
    count = LiveStorage(CPU, lambda func, args: 0)
    assert count.watch([layer.weight, layer.weight.view(-1)]) == size
    with torch.no_grad(), count:
        out = layer(torch.ones(256, 256))
        view = out.t()[:10]
        assert count.current == 2 * size
        del out
        assert count.current == 2 * size
        del view
    assert count.current == size
    assert count.peak == 3 * size


def test_workspace_is_asked_of_ops_of_the_head():
    seen = []

    def workspace(func, args):
        seen.append(is_op(func, "linear_logps"))
        return 7 * 2**20 if seen[-1] else 0

    with LiveStorage(CPU, workspace) as count:
        linear_logps(torch.randn(8, 16), torch.randn(32, 16), torch.zeros(8, dtype=torch.long))
    assert sum(seen) == 1
    assert count.largest_workspace == 7 * 2**20 < count.peak


@pytest.mark.skipif(not Heap.available(), reason="needs glibc 2.33")
def test_heap_takes_blocks_without_touching_them():
    heap = Heap()
    block = heap.take(2**31)
    assert 2**31 <= heap.peak < 2**31 + 2**26
    heap.give(block)
    heap.give(heap.take(0))
    with pytest.raises(MemoryError, match="no room for a block of"):
        heap.take(2**60)
