"""Start-up checks: does this model, on this backend, give on packs what it gives on plain sequences?

Some models never call the registered attention function, mix tokens elsewhere (state-space layers, convolutions), or
drop keyword arguments on the way. They would train on silently different numbers, so they are refused by name.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import distributed
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..errors import BackendError, UserError, out_of_memory
from ..packing.layout import PackedBatch, build_batch
from .diagnosis import first_difference
from .layers import largest, text_model
from .policy import Policy
from .precision import float32_weights

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest allowed difference of a token's log-prob from the model's own eager forward, in nats."""
_OWN_ERRORS = 2
"""How many times the error of the model's own eager forward, in the same dtype, packs may have."""
_EXPERT_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# What configs and modules call the reach of local or sparse attention, in tokens.
_REACH = re.compile(
    r"(swa_)?sliding_window(_size)?|(local_)?attention_(window|chunk)_size|local_attention|window_size|keep_window_size"
    r"|index_topk(_blocks)?|index_block_size"
)
_PROBE_REACH = 3
# Names of learned or tabulated absolute positions.
_POSITIONS = re.compile(r"wpe|embed_positions|pos(ition)?s?_emb(ed|edding|eddings)?")
_ADVICE = "choose a family that docs/conformance.md lists as equal"
# What models raise on input of a form that they did not expect.
_MODEL_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)


def check_packing(policy: Policy, *, share_prompts: bool = True, seed: int = 0) -> None:
    """Compare a small pack with the model's own forward, perturb one response, switch to training mode.

    Attention that reaches only so far is given a reach shorter than the probe, so that windows count.

    Args:
        policy: before its first optimizer step.
        share_prompts: the layout to check.

    Raises:
        UserError: the model is not equal on packs, a response changes another one's log-probs, or training mode does.
        BackendError: the attention backend cannot compute the model, or fails; no fault of the model.
    """
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad(), _short_reach(policy.causal_lm):
            reason = _difference(policy, share_prompts, seed)
            if reason is None:
                return
            if share_prompts and _difference(policy, False, seed) is None:
                raise UserError(f"{reason}; without shared prompts it is equal: set packing.share_prompts to false")
            if _equal_in_float32(policy, share_prompts, seed):
                raise UserError(f"{reason}; in float32 it is equal: set model.dtype to float32")
            raise UserError(f"{reason}; {_ADVICE}")
    finally:
        policy.train(training)


def _equal_in_float32(policy: Policy, share_prompts: bool, seed: int) -> bool:
    """Whether only half precision is at fault, such as code of a model that mixes dtypes under autocast."""
    half = policy.compute_dtype
    # Sharded weights are cast where they are gathered.
    if half == torch.float32 or policy.sharded or any(p.dtype == half for p in policy.parameters()):
        return False
    policy.compute_dtype = torch.float32
    try:
        return _difference(policy, share_prompts, seed) is None
    except BackendError:
        return False
    finally:
        policy.compute_dtype = half


def _difference(policy: Policy, share_prompts: bool, seed: int) -> str | None:
    """Why this model cannot train on packs of this layout, or None."""
    name = _name(policy)
    groups = _probe_groups(policy.config, seed)
    batch = build_batch(groups, share_prompts=share_prompts).to(policy.device)
    try:
        packed = policy.logps(batch)
        return (
            _leak(policy, groups, batch, packed, share_prompts)
            or _inequality(policy, groups, packed)
            or _randomness(policy, batch)
        )
    except BackendError:
        raise
    except UserError as error:
        return f"{name} cannot run on packs: {error}"
    except _MODEL_ERRORS as error:
        if distributed.lost_connection(error) or out_of_memory(error) is not None:
            raise
        words = str(error).strip().splitlines() or [""]
        return f"{name} cannot run on packs: {type(error).__name__} in {_innermost_module(error)}: {words[0]}"


def _innermost_module(error: BaseException) -> str:
    """The type of the module whose method raised."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((type(owner).__name__ for owner in reversed(frames) if isinstance(owner, nn.Module)), "its forward")


def _name(policy: Policy) -> str:
    return type(policy.causal_lm).__name__


@contextmanager
def _short_reach(model: nn.Module) -> Iterator[None]:
    """Give every window of a model and its configs ``_PROBE_REACH`` tokens for a while."""
    owners: dict[int, Any] = {id(module): module for module in model.modules()}
    for module in list(owners.values()):
        config = getattr(module, "config", None)
        while config is not None and id(config) not in owners:
            owners[id(config)] = config
            config = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = [
        (owner, name, value)
        for owner in owners.values()
        for name, value in vars(owner).items()
        if type(value) is int and value > _PROBE_REACH and _REACH.fullmatch(name)
    ]
    for owner, name, _ in found:
        setattr(owner, name, _PROBE_REACH)
    try:
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


def _probe_groups(config: Any, seed: int) -> list[PreferenceGroup]:
    """Two small groups of random tokens, none of which has a meaning of its own, such as padding or an image."""
    text = config.get_text_config()
    owners = (config, text)
    named = [v for o in owners for k, v in vars(o).items() if k.endswith(("token_id", "token_index"))]
    # A config may name several tokens that end a text.
    special = {i for v in named for i in (v if isinstance(v, list | tuple) else [v])}
    ordinary = np.array([i for i in range(text.vocab_size) if i not in special] or [0], dtype=np.int32)
    generator = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray:
        return generator.choice(ordinary, size)

    return [PreferenceGroup(0, draw(7), (draw(5), draw(9))), PreferenceGroup(1, draw(3), (draw(4), draw(1), draw(6)))]


def _leak(policy, groups, batch: PackedBatch, packed: torch.Tensor, share_prompts: bool) -> str | None:
    """Changing the tokens of one response must not change one bit of any other response."""
    start, stop = batch.cu_responses_S1[:2].tolist()
    first_group = groups[0]
    changed = _probe_groups(policy.config, seed=1)[0].response_ids[0]
    perturbed = [replace(first_group, response_ids=(changed, *first_group.response_ids[1:])), *groups[1:]]
    other = policy.logps(build_batch(perturbed, share_prompts=share_prompts).to(policy.device))
    if not _unchanged(policy, packed[stop:], other[stop:]):
        return f"{_name(policy)} leaks tokens between responses of a pack{_where(policy, groups)}"
    if torch.equal(packed[start:stop], other[start:stop]):
        return f"{_name(policy)} ignores its input in the isolation check"
    return None


def _where(policy: Policy, groups: list[PreferenceGroup]) -> str:
    """Where a pack of two sequences first differs from the second one."""
    pack = build_batch([replace(g, response_ids=g.response_ids[:1]) for g in groups]).to(policy.device)
    return f", first in {first_difference(policy, pack, pack.plan.segments[-1].start)}"


def _randomness(policy: Policy, batch: PackedBatch) -> str | None:
    """Dropout that could not be switched off would make the policy another function than its reference.

    The dropout of adapters is asked for; the reference, which this looks at, has none.
    """
    with policy.reference_mode():
        evaluation = policy.logps(batch)
        policy.train()
        training = policy.logps(batch)
        policy.eval()
    if _unchanged(policy, evaluation, training):
        return None
    return (
        f"{_name(policy)} gives other log-probs in training mode than in evaluation: it has dropout or noise that "
        "cannot be switched off here; set its probabilities to 0 in the model's config.json"
    )


def check_dataset(policy: Policy, dataset: PreferenceDataset) -> None:
    """Raise a ``UserError`` that names the first row that the model cannot read, or cannot read alike in a pack."""
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if dataset.largest_id >= size:
        for group in dataset:
            largest = max(int(ids.max()) for ids in (group.prompt_ids, *group.response_ids))
            if largest >= size:
                raise UserError(
                    f"row {group.row}: token {largest} is outside the {size:,} embeddings of {_name(policy)}: the "
                    "tokenizer has more tokens than the model; use the model's own tokenizer, or resize its embeddings"
                )
    limit, reason = _length_limit(policy)
    if limit is None:
        return
    for group, lengths in zip(dataset, dataset.lengths, strict=True):
        longest = int(lengths[0] + lengths[1:].max())
        if longest > limit:
            raise UserError(
                f"row {group.row}: prompt and response have {longest:,} tokens, and {_name(policy)} {reason}; "
                f"set data.max_length to {limit} or less"
            )


def _length_limit(policy: Policy) -> tuple[int | None, str]:
    """The longest sequence that gives in any pack what it gives alone, and what happens beyond."""
    config: Any = policy.config.get_text_config()
    limits: list[tuple[int, str]] = []
    # A vision tower has a table, too, of the patches of its images.
    for name, module in text_model(policy.causal_lm).named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name.rpartition(".")[2]):
            size = min(module.num_embeddings, getattr(config, "max_position_embeddings", module.num_embeddings))
            limits.append((size, f"has {size:,} positions"))
    rope = getattr(config, "rope_parameters", None) or {}
    for section in (rope, *rope.values()):
        if isinstance(section, dict) and section.get("rope_type") in ("longrope", "dynamic"):
            size = section.get("original_max_position_embeddings") or config.max_position_embeddings
            kind = section["rope_type"]
            limits.append((size, f"scales all positions by the longest sequence of a pack beyond {size:,} ({kind})"))
    return min(limits, default=(None, ""))


def _unchanged(policy: Policy, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Equal to the bit. With experts, another token's route changes the shapes of matrix products, so to rounding."""
    if not has_experts(policy.config):
        return torch.equal(before, after)
    return bool((before - after).abs().max() <= _EXPERT_ROUNDING[policy.compute_dtype])


def has_experts(config) -> bool:
    """Whether a transformers config is of a mixture of experts."""
    text = config.get_text_config()
    return largest(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") > 1


def _inequality(policy: Policy, groups, packed: torch.Tensor) -> str | None:
    """Packs are held to the model's own eager forward in float32, with twice the error of that forward in bfloat16."""
    sequences = [(g.prompt_ids, r) for g in groups for r in g.response_ids]
    with _own_attention(policy):
        own = torch.cat([_plain_logps(policy, p, r) for p, r in sequences])
        allowed = _TOLERANCE[policy.compute_dtype]
        worst = (packed - own).abs().max().item()
        if worst > allowed and policy.compute_dtype != torch.float32:
            exact = _exact_logps(policy, sequences)
            if exact is not None:
                allowed = max(allowed, _OWN_ERRORS * (own - exact).abs().max().item())
                worst = (packed - exact).abs().max().item()
    # written so that NaN is refused
    if worst <= allowed:
        return None
    return (
        f"{_name(policy)} gives different log-probs on packs than on single sequences (largest difference {worst:.3g} "
        f"nats per token){_where(policy, groups)}"
    )


@contextmanager
def _own_attention(policy: Policy) -> Iterator[None]:
    """The model's own eager attention for a while."""
    model: Any = policy.causal_lm
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _exact_logps(policy: Policy, sequences: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor | None:
    """Log-probs by the model's own forward in float32, or None where it does not run so.

    The error of bfloat16 grows with the scores of attention, so two right ways to compute a good model can differ much.
    """
    try:
        with float32_weights(policy.causal_lm):
            return torch.cat([_plain_logps(policy, p, r, exact=True) for p, r in sequences])
    except RuntimeError as error:
        if distributed.lost_connection(error) or out_of_memory(error) is not None:
            raise
        return None


def _plain_logps(policy: Policy, prompt: np.ndarray, response: np.ndarray, *, exact: bool = False) -> torch.Tensor:
    """Log-probs of a response by the model's own forward, one sequence at a time."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64)).to(policy.device)
    logits = policy.plain_logits(ids[None], exact=exact)[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0]
