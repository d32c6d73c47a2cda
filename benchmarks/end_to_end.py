"""What both sides of the end-to-end benchmarks train on: 128 pairs, and a small Llama or a small hybrid model."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

from benchmarks.trl_peer import hh_pairs

PAIRS = 128
VOCAB = 16384
HH_FILE = "hh-harmless-test.jsonl.gz"


def hh_file() -> Path | None:
    """Anthropic HH, harmless-base/test: from ``DPO_BENCH_HH``, or from the data folder of a development checkout."""
    candidates = [os.environ.get("DPO_BENCH_HH"), Path(__file__).resolve().parents[2] / "shared" / "data" / HH_FILE]
    return next((Path(c) for c in candidates if c and Path(c).is_file()), None)


def benchmark_rows() -> tuple[str, list[dict[str, str]], list[str]]:
    """The data's name, the first 128 shared-prompt pairs, and the text to train the tokenizer on."""
    path = hh_file()
    if path is None:
        rows = generated_rows(PAIRS)
        return "generated pairs with lengths like HH", rows, [r["prompt"] + r["chosen"] for r in rows]
    with gzip.open(path, "rt") as lines:
        dialogues = [json.loads(line) for line in lines]
    return f"first {PAIRS} pairs of {path.name}", hh_pairs(dialogues)[:PAIRS], [d["chosen"] for d in dialogues]


def generated_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of random words with long prompts and short, very unequal answers, as in HH."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randint(2, 9))) for _ in range(20_000)]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=max(1, round(rng.lognormvariate(0, 0.9) * mean))))

    return [
        {
            "prompt": f"\n\nHuman: {text(90)}?\n\nAssistant:",
            "chosen": f" {text(30)}.",
            "rejected": f" {text(30)}.",
        }
        for _ in range(count)
    ]


def save_model(folder: Path, texts: list[str], seed: int = 0, *, hybrid: bool = False) -> None:
    """A random model of 4 layers and hidden size 256, and a byte-level BPE tokenizer, 16,384 tokens each.

    Args:
        hybrid: a Qwen3.5 of which 3 layers have a gated delta net for attention, instead of a Llama.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    set_seed(seed)
    AutoModelForCausalLM.from_config(_config(hybrid)).save_pretrained(folder)


def _config(hybrid: bool) -> Any:
    from transformers import LlamaConfig, Qwen3_5TextConfig

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if not hybrid:
        return LlamaConfig(**sizes)
    # As in Qwen3.5 9B, keys are half as wide as the hidden states, values as wide, and the last of four layers attends.
    linear = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 64, "value_head_dim": 64}
    return Qwen3_5TextConfig(**sizes, head_dim=32, **{f"linear_{name}": size for name, size in linear.items()})
