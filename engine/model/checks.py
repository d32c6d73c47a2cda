"""Start-up checks: does this model, on this backend, give on packs what it gives on plain sequences?

Some models never call the registered attention function, mix tokens elsewhere (state-space layers, convolutions), or
drop keyword arguments on the way. They would train on silently different numbers, so they are refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.model.policy import Policy
from engine.packing.layout import PackedBatch, build_batch

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest allowed difference of a token's log-prob from the model's own eager forward, in nats."""
_EXPERT_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def check_packing(policy: Policy, *, seed: int = 0) -> None:
    """Compare a small shared-prompt pack with the model's own forward, perturb one response, switch to training mode.

    Args:
        policy: before its first optimizer step.

    Raises:
        UserError: the model is not equal on packs, a response changes another one's log-probs, or training mode does.
    """
    name = _name(policy)
    groups = _probe_groups(policy.config.get_text_config().vocab_size, seed)
    batch = build_batch(groups).to(policy.device)
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            packed = _logps(policy, batch, name)
            _check_isolation(policy, groups, batch, packed, name)
            _check_equality(policy, groups, packed, name)
            _check_randomness(policy, batch, name)
    finally:
        policy.train(training)


def _name(policy: Policy) -> str:
    return type(policy.causal_lm).__name__


def _probe_groups(vocab_size: int, seed: int) -> list[PreferenceGroup]:
    generator = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray:
        return generator.integers(0, vocab_size, size, dtype=np.int32)

    return [PreferenceGroup(0, draw(7), (draw(5), draw(9))), PreferenceGroup(1, draw(3), (draw(4), draw(1), draw(6)))]


def _logps(policy: Policy, batch: PackedBatch, name: str) -> torch.Tensor:
    try:
        return policy.logps(batch)
    except TypeError as error:
        raise UserError(f"{name} cannot run on packs: {error}") from error


def _check_isolation(policy, groups, batch: PackedBatch, packed: torch.Tensor, name: str) -> None:
    """Changing the tokens of one response must not change one bit of any other response."""
    vocab_size = policy.config.get_text_config().vocab_size
    start, stop = batch.cu_responses_S1[:2].tolist()
    first_group = groups[0]
    changed = (first_group.response_ids[0] + 1) % vocab_size
    perturbed = [replace(first_group, response_ids=(changed, *first_group.response_ids[1:])), *groups[1:]]
    other = policy.logps(build_batch(perturbed).to(policy.device))
    if not _unchanged(policy, packed[stop:], other[stop:]):
        raise UserError(
            f"{name} leaks tokens between responses of a pack (attention backend {policy.backend.name}): "
            "it mixes tokens outside the attention interface and is not supported"
        )
    if torch.equal(packed[start:stop], other[start:stop]):
        raise UserError(f"{name} ignores its input in the isolation check and is not supported")


def _check_randomness(policy: Policy, batch: PackedBatch, name: str) -> None:
    """Dropout that could not be switched off would make the policy another function than its reference.

    The dropout of adapters is asked for; the reference, which this looks at, has none.
    """
    with policy.reference_mode():
        packed = _logps(policy, batch, name)
        policy.train()
        training = _logps(policy, batch, name)
    if not _unchanged(policy, packed, training):
        raise UserError(
            f"{name} gives other log-probs in training mode than in evaluation: it has dropout or noise that cannot be "
            "switched off here; set its probabilities to 0 in the model's config.json"
        )


def check_vocabulary(policy: Policy, dataset: PreferenceDataset) -> None:
    """Raise a ``UserError`` that names the first row with a token that the model has no embedding for."""
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if dataset.largest_id < size:
        return
    for group in dataset:
        largest = max(int(ids.max()) for ids in (group.prompt_ids, *group.response_ids))
        if largest >= size:
            raise UserError(
                f"row {group.row}: token {largest} is outside the {size:,} embeddings of {_name(policy)}: the "
                "tokenizer has more tokens than the model; use the model's own tokenizer, or resize its embeddings"
            )


def _unchanged(policy: Policy, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Equal to the bit. With experts, another token's route changes the shapes of matrix products, so to rounding."""
    if not has_experts(policy.config):
        return torch.equal(before, after)
    return bool((before - after).abs().max() <= _EXPERT_ROUNDING[policy.compute_dtype])


def has_experts(config) -> bool:
    """Whether a transformers config is of a mixture of experts."""
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)


def _check_equality(policy: Policy, groups, packed: torch.Tensor, name: str) -> None:
    model: Any = policy.causal_lm
    implementation = model.config._attn_implementation
    sequences = [(g.prompt_ids, r) for g in groups for r in g.response_ids]
    model.set_attn_implementation("eager")
    try:
        with policy.autocast():
            expected = torch.cat([_plain_logps(model, p, r, policy.device) for p, r in sequences])
    finally:
        model.set_attn_implementation(implementation)
    worst = (packed - expected).abs().max().item()
    if not worst <= _TOLERANCE[policy.compute_dtype]:
        raise UserError(
            f"{name} gives different log-probs on packs than on single sequences (largest difference {worst:.3g} nats "
            f"per token, attention backend {policy.backend.name}): this model is not supported"
        )


def _plain_logps(model, prompt: np.ndarray, response: np.ndarray, device: torch.device) -> torch.Tensor:
    """Log-probs of a response by the model's own forward, one sequence at a time."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64)).to(device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0]
