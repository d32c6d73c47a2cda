"""The model that all start from, which is also the reference, and the pairs that are made of its answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.plain_json import to_json

from .exact import answers, rewards
from .language import END, MAX_TOKENS, PROMPTS, TOKEN, VOCABULARY, dialogue
from .size import Size

COMPLETIONS = 4
"""Answers to each prompt, so six pairs."""
BATCH = 64


def padded(sequences: list[list[int]]) -> dict[str, Tensor]:
    """A batch in which all but the prompt, which is one token, counts."""
    length = max(map(len, sequences))
    rest = [length - len(sequence) for sequence in sequences]
    return {
        "input_ids": torch.tensor([ids + [TOKEN[END]] * more for ids, more in zip(sequences, rest, strict=True)]),
        "attention_mask": torch.tensor([[1] * (length - more) + [0] * more for more in rest]),
        "labels": torch.tensor([[-100, *ids[1:], *[-100] * more] for ids, more in zip(sequences, rest, strict=True)]),
    }


def make_reference(folder: Path, size: Size) -> None:
    """Train a tiny Llama on the language by next-token prediction; write it and its tokenizer."""
    torch.manual_seed(size.seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 + MAX_TOKENS,
        # At transformers' 0.02 a model this narrow needs several times the steps.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=TOKEN[END],
        pad_token_id=TOKEN[END],
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, size.reference_steps)
    rng = random.Random(f"{size.seed}/language")
    for _ in range(size.reference_steps):
        model(**padded([dialogue(rng) for _ in range(BATCH)])).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(TOKEN, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)


def write_pairs(path: Path, prompts: int, ref_logps: Tensor, size: Size, name: str) -> int:
    """Answer ``prompts`` prompts four times each from the reference, and let the reward choose in each pair.

    Chosen is the first with probability sigmoid(reward of the first - reward of the second): labels of the
    Bradley-Terry model, which DPO assumes. Answers that are the same make no pair.

    Args:
        ref_logps: [prompts of the language, answers], what answers are drawn from.

    Returns:
        The number of pairs.
    """
    rows = list(_pairs(prompts, ref_logps, size, name))
    path.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def _pairs(prompts: int, ref_logps: Tensor, size: Size, name: str) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{size.seed}/{name}")
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    texts, values = answers(size.max_tokens), rewards(size.max_tokens)
    for _ in range(prompts):
        p = rng.randrange(len(PROMPTS))
        drawn = torch.multinomial(ref_logps[p].exp(), COMPLETIONS, replacement=True, generator=generator).tolist()
        for place, first in enumerate(drawn):
            for second in drawn[:place]:
                if first != second:
                    wins = rng.random() < torch.sigmoid(values[p, first] - values[p, second]).item()
                    chosen, rejected = (first, second) if wins else (second, first)
                    yield {
                        "prompt_ids": [TOKEN[PROMPTS[p]]],
                        "chosen_ids": list(texts[chosen]),
                        "rejected_ids": list(texts[rejected]),
                    }
