"""The demo's language as tensors: questions about animals, answered kindly or curtly.

A response is a window of R tokens: the answer, then the end token to the end of the window, as LLaDA pads them. So a
response has one length, and how long the answer is, is part of what the model predicts.

Legend: B pairs or dialogues, P tokens of a prompt, R tokens of a response.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from engine.demo.base_model import ASSISTANT, END, USER, train_tokenizer
from engine.demo.corpus import Pair, dialogues, preference_pairs, split_subjects, style_of

PROMPT, WINDOW = 24, 32
"""Tokens. Longer prompts, half of the demo's, and longer answers, one in a hundred, are left out: for speed."""


class Dialogues(NamedTuple):
    """Prompts with one response each."""

    prompts_BP: Tensor
    """Padded on the left, so that every response starts at the same place."""
    responses_BR: Tensor


class Pairs(NamedTuple):
    """Prompts with a chosen and a rejected response."""

    prompts_BP: Tensor
    chosen_BR: Tensor
    rejected_BR: Tensor

    def part(self, rows: Tensor | slice) -> Pairs:
        return Pairs(*(tensor[rows] for tensor in self))

    def responses(self) -> Dialogues:
        """Both responses of each pair, all chosen ones first: [2 B, ...]."""
        return Dialogues(self.prompts_BP.repeat(2, 1), torch.cat([self.chosen_BR, self.rejected_BR]))


@dataclass(frozen=True)
class Language:
    """A tokenizer, and what was written in it."""

    tokenizer: PreTrainedTokenizerFast
    text: Dialogues
    """What the starting model learns: both styles in equal parts."""
    pairs: Pairs
    """What preferences are learned from: the kind answer is chosen."""
    held_out: Pairs
    """About subjects that no training pair asks about."""

    def words(self, ids_R: Tensor) -> str:
        """Text of a prompt or a response."""
        return str(self.tokenizer.decode(ids_R, skip_special_tokens=True)).strip()

    def styles(self, responses_BR: Tensor) -> Counter[str]:
        """How many responses open in each style, or in "neither"."""
        return Counter(style_of(self.words(ids_R)) or "neither" for ids_R in responses_BR)


def make_language(texts: int, pairs: int, held_out: int, seed: int) -> Language:
    """A tokenizer, those of ``texts`` dialogues that fit, and so many pairs; all of it follows from the seed."""
    said = list(dialogues(texts, seed))
    tokenizer = train_tokenizer(message["content"] for dialogue in said for message in dialogue)
    learned, unseen = split_subjects(seed)
    both = [(question["content"], answer["content"]) for question, answer in said]
    prompts, responses = _columns(tokenizer, both)
    return Language(
        tokenizer,
        Dialogues(prompts, responses),
        _pairs(tokenizer, preference_pairs(4 * pairs, learned, seed, "train"), pairs),
        _pairs(tokenizer, preference_pairs(4 * held_out, unseen, seed, "held-out"), held_out),
    )


def _pairs(tokenizer: PreTrainedTokenizerFast, found: Sequence[Pair], count: int) -> Pairs:
    """The first ``count`` that fit; about half of them do."""
    columns = _columns(tokenizer, [(pair.prompt, pair.chosen, pair.rejected) for pair in found])
    pairs = Pairs(*columns).part(slice(count))
    assert len(pairs.prompts_BP) == count
    return pairs


def _columns(tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, ...]]) -> list[Tensor]:
    """Rows of a prompt and responses as one tensor a column; rows that do not fit are left out."""
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(END)
    encoded = [
        tokenizer([f"{USER}{row[place]}{END}{ASSISTANT}" if place == 0 else row[place] for row in rows])["input_ids"]
        for place in range(len(rows[0]))
    ]
    kept = [row for row in zip(*encoded, strict=True) if len(row[0]) <= PROMPT and max(map(len, row[1:])) < WINDOW]
    prompts = [[pad] * (PROMPT - len(row[0])) + row[0] for row in kept]
    responses = [
        [ids + [end] * (WINDOW - len(ids)) for ids in column] for column in islice(zip(*kept, strict=True), 1, None)
    ]
    return [torch.tensor(column) for column in (prompts, *responses)]


def batches(rows: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers [size] of every step: all rows in a new random order, epoch after epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(rows, generator=generator)])
        yield order[:size]
        order = order[size:]
