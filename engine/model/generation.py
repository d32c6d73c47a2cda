"""Answers that a policy gives: transformers' own generation, on the model as it is trained.

Shape suffixes: B prompts of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .layouts import own_attention
from .policy import Policy

Ids = Sequence[int] | np.ndarray


def generate(
    policy: Policy,
    prompts: Sequence[Ids],
    *,
    stops: Collection[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    tokens_per_batch: int = 8192,
) -> list[np.ndarray]:
    """One answer to each prompt, drawn from the policy's own distribution; the random numbers of a run stay theirs.

    No token is left out of what is drawn from (no top-k, no top-p), nor made less likely as the model's
    generation_config.json may ask, so that the answers are samples of the policy at temperature 1. The model runs with
    its own attention and in evaluation mode meanwhile. Of a sharded policy every rank must call this, and all draw the
    same answers, for each token of which all weights are gathered.

    Args:
        prompts: token ids, each at least one.
        stops: tokens that end an answer; they are part of it.
        max_new_tokens: where an answer is cut.
        temperature: 0 takes the most likely token each time.
        seed: of the draws.
        tokens_per_batch: prompts with their answers that run together, padding included.

    Returns:
        int32 arrays in the order of ``prompts``, each of one token or more.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    with _generating(policy, seed):
        for batch in _batches([len(prompts[i]) + max_new_tokens for i in order], _limit(policy, tokens_per_batch)):
            places = [order[i] for i in batch]
            ids_BT, mask_BT = _padded([prompts[i] for i in places], min(stops, default=0))
            with policy.autocast():
                output_BT = policy.generate_ids(
                    input_ids=ids_BT.to(policy.device),
                    attention_mask=mask_BT.to(policy.device),
                    generation_config=_settings(stops, max_new_tokens, temperature),
                )
            for place, ids in zip(places, output_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
                answers[place] = _until(ids, stops)
    return answers


def _limit(policy: Policy, tokens_per_batch: int) -> int:
    """Rows of a model that knows no padding go one by one."""
    return 0 if policy.layout.kind == "single" else tokens_per_batch


def _settings(stops: Collection[int], max_new_tokens: int, temperature: float) -> Any:
    from transformers import GenerationConfig

    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    # Any token pads what an answer has ended before: it is cut off there.
    ends = {"eos_token_id": sorted(stops)} if stops else {}
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": min(stops, default=0), "do_sample": bool(temperature)}
    return GenerationConfig(**options, **drawn, **ends)


@contextmanager
def _generating(policy: Policy, seed: int) -> Iterator[None]:
    from transformers import GenerationConfig

    training = policy.training
    model: Any = policy.causal_lm
    # transformers takes from it what a call leaves open: penalties of repetition, banned tokens, a temperature.
    own_settings, model.generation_config = model.generation_config, GenerationConfig()
    devices = [] if policy.device.type == "cpu" else [policy.device]
    policy.eval()
    try:
        with torch.no_grad(), own_attention(policy), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = own_settings
        policy.train(training)


def _batches(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Places of ascending sizes, as many together as fit when all are padded to the largest."""
    batch: list[int] = []
    for place, size in enumerate(sizes):
        if batch and size * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _padded(rows: Sequence[Ids], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, T] each: ids that end together, and 1 where they are no padding."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), longest), padding)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids_BT[place, longest - len(row) :] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask_BT[place, longest - len(row) :] = 1
    return ids_BT, mask_BT


def _until(ids: Sequence[int], stops: Collection[int]) -> np.ndarray:
    """Up to the first token that ends an answer, that token included."""
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
    return np.asarray(ids[:end], dtype=np.int32)
