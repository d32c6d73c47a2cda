"""The whole path with a transformers model: files, tokens, packs, store, columns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config.schema import DataConfig, LoraConfig, ModelConfig
from engine.data import load_dataset_groups, open_rows
from engine.errors import UserError
from engine.model import load_policy
from engine.reference import (
    ReferenceStore,
    export_columns,
    import_columns,
    load_ref_logps,
    load_ref_sums,
    model_digest,
    precompute,
    verify_rows,
)

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
LORA = LoraConfig(r=4)


@pytest.fixture(scope="module")
def dataset(pairs_jsonl, tiny_tokenizer):
    return load_dataset_groups(DataConfig(dataset_name=str(pairs_jsonl)), tiny_tokenizer, split="train")[0]


@pytest.fixture(scope="module")
def load(tiny_model_dir):
    def load(**options):
        config = ModelConfig(model_name_or_path=str(tiny_model_dir), **({"dtype": "float32"} | options))
        return load_policy(config, device=CPU)

    return load


@pytest.fixture(scope="module")
def expected(tiny_model_dir, dataset) -> list[tuple[np.ndarray, ...]]:
    """Log-probs by the model's own forward, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="eager")

    def score(prompt, response) -> np.ndarray:
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()

    return [tuple(score(g.prompt_ids, r) for r in g.response_ids) for g in dataset]


def assert_close(found, expected, atol: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("tokens_per_pack", [256, 2048])
def test_stored_values_are_those_of_the_plain_model(tmp_path, load, dataset, expected, share_prompts, tokens_per_pack):
    policy, store = load(), ReferenceStore(tmp_path)
    precompute(policy, dataset, store, tokens_per_pack=tokens_per_pack, share_prompts=share_prompts, progress=False)
    stored = load_ref_logps(dataset, store, model_digest(policy))
    assert_close(stored, expected, atol=2e-5)
    verify_rows(policy, dataset, stored)


def test_the_reference_of_a_lora_run_is_the_model_without_adapters(tmp_path, load, dataset, expected):
    pytest.importorskip("peft")
    policy, store = load(lora=LORA), ReferenceStore(tmp_path)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert model_digest(policy) == model_digest(load())
    report = precompute(policy, dataset, store, tokens_per_pack=512, progress=False)
    assert report.computed_rows == len(dataset)
    assert_close(load_ref_logps(dataset, store, model_digest(policy)), expected, atol=2e-5)
    assert precompute(load(), dataset, store, tokens_per_pack=512, progress=False).computed_rows == 0


def test_bfloat16_is_another_reference_near_the_first(tmp_path, load, dataset, expected):
    policy, store = load(dtype="bfloat16"), ReferenceStore(tmp_path)
    precompute(policy, dataset, store, tokens_per_pack=512, progress=False)
    digest = model_digest(policy)
    assert digest != model_digest(load())
    assert_close(load_ref_logps(dataset, store, digest), expected, atol=0.1)
    verify_rows(policy, dataset, load_ref_sums(dataset, store, digest))


def test_exported_columns_come_back_as_the_reference(tmp_path, load, dataset, pairs_jsonl, tiny_tokenizer):
    policy, store = load(), ReferenceStore(tmp_path / "store")
    precompute(policy, dataset, store, tokens_per_pack=512, progress=False)
    sums = load_ref_sums(dataset, store, model_digest(policy))
    for name in ("out.jsonl", "out.parquet"):
        path = tmp_path / name
        rows = open_rows(DataConfig(dataset_name=str(pairs_jsonl)), split="train")
        assert export_columns(path, rows, dataset, sums) == (len(dataset), 0)
        again, _ = load_dataset_groups(DataConfig(dataset_name=str(path)), tiny_tokenizer, split="train")
        imported = import_columns(again)
        assert imported == sums
        verify_rows(policy, again, imported)
        with pytest.raises(UserError, match="differ from the model's"):
            verify_rows(policy, again, [(chosen - 30, rejected) for chosen, rejected in imported])


# Forked passes share what was loaded; each runs on one thread, because the number of threads may change the last bit.
PASSES = """
import os, signal, sys, time
import torch
from engine.config.schema import DataConfig, ModelConfig
from engine.data import load_dataset_groups
from engine.model import load_policy, load_tokenizer
from engine.reference import ReferenceStore, identify, precompute

torch.set_num_threads(1)
model = ModelConfig(model_name_or_path=sys.argv[1], dtype="float32")
dataset, _ = load_dataset_groups(DataConfig(dataset_name=sys.argv[2]), load_tokenizer(model), split="train")
policy = load_policy(model, device=torch.device("cpu"))
identity = identify(policy)
real = policy.logps

def slowly(batch):
    time.sleep(0.01)
    return real(batch)

policy.logps = slowly
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    options = {"tokens_per_pack": 256, "identity": identity, "progress": False, "flush_seconds": 0}
    precompute(policy, dataset, ReferenceStore(line.strip()), **options)
    os._exit(0)
"""


def test_a_pass_that_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path, tiny_model_dir, pairs_jsonl, dataset, load
):
    script = tmp_path / "passes.py"
    script.write_text(PASSES)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(script), str(tiny_model_dir), str(pairs_jsonl)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None

        def start(folder: Path) -> int:
            parent.stdin.write(f"{folder}\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())

        def finish(folder: Path) -> None:
            pid = start(folder)
            wait_until(lambda: is_gone(pid))

        whole, killed = tmp_path / "whole", tmp_path / "killed"
        finish(whole)
        shards = len(list(whole.rglob("*.parquet")))
        assert shards > 8
        for count in (1, 4, 7):
            pid = start(killed)
            wait_until(lambda count=count: len(list(killed.rglob("*.parquet"))) >= count)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: is_gone(pid))
            assert len(list(killed.rglob("*.parquet"))) < shards
        finish(killed)
        parent.stdin.close()
    # Shards are named by their content.
    assert {p.name for p in killed.rglob("*.parquet")} == {p.name for p in whole.rglob("*.parquet")}
    assert len(load_ref_sums(dataset, ReferenceStore(killed), model_digest(load()))) == len(dataset)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
