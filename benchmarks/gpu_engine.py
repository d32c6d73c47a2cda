"""The engine on a CUDA machine: its attention backends against each other, and a short training run.

Legend: N completion tokens, V vocabulary.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.contenders import first_line
from benchmarks.recorder import Recorder, SkippedError

PAIRS_PER_STEP = 64


class Scores(NamedTuple):
    """Of one backend: log-probs [N], and the gradient of their mean with respect to all weights, flat."""

    logps: torch.Tensor
    gradient: torch.Tensor


def attention(record: Recorder) -> None:
    """Every backend on the same packs in the compute dtype, against SDPA per segment in float32.

    A backend is right when its error is at most twice that of SDPA per segment in the same dtype.
    """
    from engine.errors import UserError
    from engine.model.attention import choose_backend

    rows: list[dict[str, Any]] = []
    batch = _packed_groups(tiny=record.dry_run).to(record.device)
    for family in ("llama", "mistral"):
        exact = _score(family, "sdpa", batch, record, torch.float32)
        plain = _distance(_score(family, "sdpa", batch, record, record.dtype), exact)
        for backend in ("flash", "varlen", "sdpa"):
            row: dict[str, Any] = {"model": family, "backend": backend, "dtype": record.dtype_name}
            try:
                choose_backend(backend, record.device, record.dtype)
            except UserError as reason:
                rows.append({**row, "note": str(reason)})
                continue
            scores = _score(family, backend, batch, record, record.dtype)
            again = _score(family, backend, batch, record, record.dtype)
            error = _distance(scores, exact)
            row |= {"logp error, nats": error[0], "gradient error": error[1]}
            row["ok"] = all(e <= 2 * p + 1e-5 for e, p in zip(error, plain, strict=True))
            row["same bits twice"] = all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))
            rows.append(row)
            record["rows"] = rows
    record["rows"] = rows


def _packed_groups(*, tiny: bool):
    """Groups of one to three responses with shared prompts, of uneven length."""
    from engine.data.groups import PreferenceGroup
    from engine.packing import build_batch

    generator = np.random.default_rng(0)
    scale = 1 if tiny else 40

    def draw(low: int, high: int) -> np.ndarray:
        return generator.integers(0, 512, scale * int(generator.integers(low, high)), dtype=np.int32)

    groups = [PreferenceGroup(i, draw(2, 9), tuple(draw(1, 7) for _ in range(1 + i % 3))) for i in range(6)]
    return build_batch(groups)


def _small_model(family: str, window: int):
    """Grouped-query heads; the second family with a sliding window shorter than its sequences."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # Weights large enough that attention is no plain average.
        "initializer_range": 0.08,
    }
    torch.manual_seed(0)
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=window))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def _score(family: str, backend: str, batch, record: Recorder, dtype: torch.dtype) -> Scores:
    from engine.model.attention import Backend, register_backends
    from engine.model.policy import Policy

    register_backends()
    chosen = Backend(backend, "requested")
    model = _small_model(family, 5 if record.dry_run else 100).to(record.device)
    model.set_attn_implementation(chosen.implementation)
    policy = Policy(model, backend=chosen, compute_dtype=dtype)
    logps = policy.logps(batch)
    logps.mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return Scores(logps.detach(), gradient)


def _distance(scores: Scores, exact: Scores) -> tuple[float, float]:
    """Largest difference of a log-prob; |difference| / |gradient|."""
    logps = (scores.logps - exact.logps).abs().max().item()
    return logps, ((scores.gradient - exact.gradient).norm() / exact.gradient.norm()).item()


def training(record: Recorder) -> None:
    """``dpo train`` on a generated model and generated pairs: tokens per second, and where the loss went."""
    try:
        from engine.config.load import build_config
        from engine.train.loop import train
    except ImportError as error:
        raise SkippedError(f"the engine does not import here: {first_line(error)}") from error
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        record["model"] = _save_job(folder, tiny=record.dry_run)
        pairs_per_step = 4 if record.dry_run else PAIRS_PER_STEP
        config = build_config(
            {
                "model": {"model_name_or_path": str(folder / "model"), "dtype": record.dtype_name},
                "data": {"dataset_name": str(folder / "pairs.jsonl"), "max_length": 1024},
                "packing": {"pairs_per_step": pairs_per_step, "tokens_per_pack": 16384},
                "optim": {"learning_rate": 1e-5},
                "reference": {"store": str(folder / "store")},
                "train": {"output_dir": str(folder / "run"), "logging_steps": 1, "report_to": []},
            },
            "benchmark",
        )
        result = train(config)
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    # Compilation of the first steps' kernels is not training.
    steady = rows[len(rows) // 3 :]
    record["steps"] = result.steps
    record["rows"] = rows
    for name in ("perf/tokens_per_second", "perf/pairs_per_second", "perf/mfu", "perf/shared_fraction"):
        record[name] = statistics.median(row[name] for row in steady)
    record["perf/peak_memory_gib"] = rows[-1]["perf/peak_memory_gib"]
    record["first and last loss"] = [rows[0]["loss"], rows[-1]["loss"]]


def _save_job(folder: Path, *, tiny: bool) -> str:
    """Write a model with tokenizer and a file of pairs; returns the model in words."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from benchmarks.end_to_end import generated_rows, save_model

    rows = generated_rows(24 if tiny else 20 * PAIRS_PER_STEP)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(folder / "model", [row["prompt"] + row["chosen"] for row in rows[:256]])
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if not tiny:
        sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 12}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            num_key_value_heads=sizes["num_attention_heads"] // 2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / "model")
    return f"random Llama, {model.num_parameters() / 1e6:.0f} M parameters, vocabulary {len(tokenizer)}"
