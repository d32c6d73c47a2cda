"""Start-up checks: in which layout does this model, on this backend, give what it gives on plain sequences?

Some models never call the registered attention function, mix tokens elsewhere (state-space layers, convolutions), or
drop keyword arguments on the way. On packs they would train on silently different numbers, so modules that mix tokens
get rows, and if that is not enough the whole model does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .. import distributed, mesh
from ..config.schema import LayoutName
from ..data.groups import PreferenceGroup
from ..errors import BackendError, UserError, out_of_memory
from ..packing.layout import PackedBatch, build_batch
from .attention import Backend
from .diagnosis import first_difference, innermost_module
from .end_to_end import gradient_difference, take_boundaries
from .layers import largest
from .layouts import eager_attention, use_layout
from .load import disable_dropout, keep_in_evaluation, keeps_no_checkpoints
from .policy import Kind, Layout, Policy
from .precision import float32_weights

log = logging.getLogger(__name__)

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
_ROW_PROBES = 3
"""Probes that a model in rows is given: what picks the best of several keys may be unequal only where two are even."""
ADVICE = "choose a family that docs/conformance.md lists as equal"
Shapes = tuple[tuple[int, tuple[int, ...]], ...]
"""Tokens of the prompt and of each response of each group."""
_SMALL: Shapes = ((7, (5, 9)), (3, (4, 1, 6)))
_WIDE: Shapes = (*_SMALL, (2, (18, 40)))
"""For rows that are padded to the longest."""
_LONG: Shapes = ((20, (70, 9)), (3, (4, 1, 6)), (9, (150, 120)))
"""For rows end to end: kernels work in chunks of 64 to 256 tokens, and what one hands the next ends with its row."""
# What models raise on input of a form that they did not expect.
_MODEL_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)


class Fault(NamedTuple):
    """Why a model is not exact in a layout."""

    words: str
    mixer: str | None = None
    """The class of the first module at fault, where it may be right in rows."""


def check_packing(policy: Policy, *, share_prompts: bool = True, requested: LayoutName = "auto", seed: int = 0) -> None:
    """Have a policy compute packs in the first layout in which they are exact, from the fastest on.

    A small pack is compared with the model's own forward, one response is perturbed, and training mode is tried.
    Attention that reaches only so far is given a reach shorter than the probe, so that windows count.

    Args:
        policy: before its first optimizer step.
        share_prompts: whether packs hold a prompt once.
        requested: ``packing.layout``.

    Raises:
        UserError: packs are not equal, a response changes another one's log-probs, or training mode does, in all
            layouts that may be taken.
        BackendError: the attention backend cannot compute the model, or fails; no fault of the model.
    """
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad(), _short_reach(policy.causal_lm):
            _choose_layout(policy, requested, share_prompts, seed)
    finally:
        policy.train(training)


def _choose_layout(policy: Policy, requested: LayoutName, share_prompts: bool, seed: int) -> None:
    reason = "packing.layout asks for it"
    if requested != "rows":
        fault = _fault_on_packs(policy, share_prompts, seed)
        if fault is None:
            _join_rows(policy, share_prompts, seed)
            return
        if (ranks := mesh.context_size()) > 1:
            words = f"train.context_parallel={ranks} divides packs that a whole model shares"
            raise UserError(f"{words}, and {fault.words}; set it to 1")
        if _wrong_attention(policy, share_prompts, seed):
            _tell_of_attention(policy, requested, fault)
        reason = fault.words
        if share_prompts and policy.obstacle is None and _difference(policy, False, seed) is None:
            reason += "; without shared prompts it is equal: set packing.share_prompts to false"
            if requested == "shared":
                raise UserError(reason)
        if requested == "shared":
            raise UserError(f"{reason}; set packing.layout to auto, or {_float32_or(policy, share_prompts, seed)}")
    # Ranks run as many forward passes each, and packs hold different numbers of rows.
    layouts: tuple[Kind, ...] = ("rows", "single") if distributed.size() == 1 else ("rows",)
    for kind in layouts:
        use_layout(policy, Layout(kind, reason=reason))
        probes = (_difference(policy, share_prompts, s) for s in range(seed, seed + _ROW_PROBES))
        fault = next((found for found in probes if found is not None), None)
        if fault is None:
            return
        reason = f"{reason}; {fault.words}"
    raise UserError(f"{reason}; {_float32_or(policy, share_prompts, seed)}")


def _wrong_attention(policy: Policy, share_prompts: bool, seed: int) -> bool:
    """Whether a model that is not exact on packs is exact with the attention of torch alone."""
    chosen = policy.backend
    if policy.obstacle is not None or chosen.name == "sdpa":
        return False
    policy.backend = Backend("sdpa", "compared")
    try:
        return _fault_on_packs(policy, share_prompts, seed) is None
    except BackendError:
        return False
    finally:
        policy.backend = chosen
        use_layout(policy, Layout())


def _tell_of_attention(policy: Policy, requested: LayoutName, fault: Fault) -> None:
    name = policy.backend.name
    words = f"attention backend {name} gives wrong numbers here, and sdpa right ones: {fault.words}"
    advice = f"set model.attention to sdpa, or install {name} anew"
    if policy.backend.asked_for or requested == "shared":
        raise BackendError(f"{words}; {advice}")
    log.warning("%s; the model runs in rows, which is slower: %s", words, advice)


def _fault_on_packs(policy: Policy, share_prompts: bool, seed: int) -> Fault | None:
    """Give modules that mix tokens rows, one class after another, until packs are exact; why they are not, or None."""
    if policy.obstacle is not None:
        return Fault(f"{_name(policy)} cannot run on packs: {policy.obstacle}")
    layout, first = Layout(), None
    while True:
        use_layout(policy, layout)
        fault = _difference(policy, share_prompts, seed)
        if fault is None:
            return None
        first = first or fault
        if fault.mixer is None or fault.mixer in layout.mixers or mesh.context_size() > 1:
            return first
        layout = Layout("mixers", (*layout.mixers, fault.mixer), first.words)


def _join_rows(policy: Policy, share_prompts: bool, seed: int) -> None:
    """Lay rows of mixers end to end where these take boundaries and give the same numbers, gradients included."""
    padded = policy.layout
    if not take_boundaries(policy.causal_lm, padded.mixers):
        return
    use_layout(policy, padded._replace(joined=True))
    fault = _difference(policy, share_prompts, seed)
    words = fault.words if fault is not None else None
    if words is None:
        words = gradient_difference(policy, probe_batch(policy, share_prompts, seed))
    if words is not None:
        use_layout(policy, padded._replace(padded_for=words))


def _float32_or(policy: Policy, share_prompts: bool, seed: int) -> str:
    """What a user may do about a model that is exact in no layout."""
    if policy.obstacle is None:
        use_layout(policy, Layout())
    if _equal_in_float32(policy, share_prompts, seed):
        return "in float32 it is equal: set model.dtype to float32"
    return ADVICE


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


def _difference(policy: Policy, share_prompts: bool, seed: int) -> Fault | None:
    """Why this model cannot train in its layout, or None."""
    name = _name(policy)
    groups = probe_groups(policy.config, seed, _shapes(policy))
    share_prompts = share_prompts and not policy.layout.in_rows
    batch = probe_batch(policy, share_prompts, seed)
    try:
        packed = policy.logps(batch)
        return (
            _leak(policy, groups, batch, packed, share_prompts, seed)
            or _inequality(policy, groups, packed)
            or _randomness(policy, batch)
        )
    except BackendError:
        raise
    except UserError as error:
        return Fault(f"{name} cannot run {place_words(policy)}: {error}")
    except _MODEL_ERRORS as error:
        if distributed.lost_connection(error) or out_of_memory(error) is not None:
            raise
        words = str(error).strip().splitlines() or [""]
        module = innermost_module(error)
        place = f"{type(error).__name__} in {'its forward' if module is None else type(module).__name__}"
        return Fault(f"{name} cannot run {place_words(policy)}: {place}: {words[0]}")


def place_words(policy: Policy) -> str:
    """Where a policy computes packs, such as ``in padded rows``."""
    places = {"rows": "in padded rows", "single": "one row at a time"}
    return "with rows end to end" if policy.layout.joined else places.get(policy.layout.kind, "on packs")


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


def _shapes(policy: Policy) -> Shapes:
    if policy.layout.joined:
        return _LONG
    return _WIDE if policy.layout.kind == "rows" else _SMALL


def probe_batch(policy: Policy, share_prompts: bool, seed: int = 0) -> PackedBatch:
    """A small pack as a policy will be given packs, on its device."""
    groups = probe_groups(policy.config, seed, _shapes(policy))
    # Whole models in rows are never given a prompt for all of its responses.
    return build_batch(groups, share_prompts=share_prompts and not policy.layout.in_rows).to(policy.device)


def probe_groups(config: Any, seed: int, shapes: Shapes = _SMALL) -> list[PreferenceGroup]:
    """Small groups of random tokens, none of which has a meaning of its own, such as padding or an image."""
    text = config.get_text_config()
    owners = (config, text)
    named = [v for o in owners for k, v in vars(o).items() if k.endswith(("token_id", "token_index"))]
    # A config may name several tokens that end a text.
    special = {i for v in named for i in (v if isinstance(v, list | tuple) else [v])}
    ordinary = np.array([i for i in range(text.vocab_size) if i not in special] or [0], dtype=np.int32)
    generator = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray:
        return generator.choice(ordinary, size)

    return [PreferenceGroup(row, draw(p), tuple(map(draw, responses))) for row, (p, responses) in enumerate(shapes)]


def _leak(policy, groups, batch: PackedBatch, packed: torch.Tensor, share_prompts: bool, seed: int) -> Fault | None:
    """Changing the last tokens of one response must not change one bit of any other response, or of what is before."""
    start, stop = batch.cu_responses_S1[:2].tolist()
    first_group = groups[0]
    others = probe_groups(policy.config, seed + _ROW_PROBES, _shapes(policy))
    response, drawn = (group.response_ids[0] for group in (first_group, others[0]))
    kept = len(response) // 2
    changed = np.concatenate([response[:kept], drawn[kept:]])
    perturbed = [replace(first_group, response_ids=(changed, *first_group.response_ids[1:])), *groups[1:]]
    other = policy.logps(build_batch(perturbed, share_prompts=share_prompts).to(policy.device))
    if not _unchanged(policy, packed[stop:], other[stop:]):
        where = "rows" if policy.layout.in_rows else "responses of a pack"
        return _placed(policy, groups, f"{_name(policy)} leaks tokens between {where}")
    if not _unchanged(policy, packed[start : start + kept], other[start : start + kept]):
        words = "what it says of a token depends on the tokens behind it"
        return Fault(f"{_name(policy)} is not causal {place_words(policy)}: {words}")
    if torch.equal(packed[start + kept : stop], other[start + kept : stop]):
        return Fault(f"{_name(policy)} ignores its input in the isolation check")
    return None


def _placed(policy: Policy, groups: list[PreferenceGroup], words: str) -> Fault:
    """A fault, with where a pack of two sequences first differs from the second one."""
    if policy.layout.in_rows or policy.layout.joined:
        return Fault(words)
    pack = build_batch([replace(g, response_ids=g.response_ids[:1]) for g in groups]).to(policy.device)
    place = first_difference(policy, pack, pack.plan.segments[-1].start)
    return Fault(f"{words}, first in {place.words}", place.mixer)


def _randomness(policy: Policy, batch: PackedBatch) -> Fault | None:
    """Dropout that could not be switched off would make the policy another function than its reference.

    The dropout of adapters is asked for; the reference, which this looks at, has none.
    """

    def changes() -> bool:
        with policy.reference_mode():
            evaluation = policy.logps(batch)
            policy.train()
            training = policy.logps(batch)
            policy.eval()
        return not _unchanged(policy, evaluation, training)

    if not changes():
        return None
    # such as models that read their probabilities from the config whenever they run, or that exchange modules then
    policy.disabled_dropouts += disable_dropout(policy.causal_lm)
    for module in policy.causal_lm.modules():
        if type(module).__module__.startswith("transformers") and keeps_no_checkpoints(module):
            keep_in_evaluation(module)
    if not changes():
        return None
    return Fault(
        f"{_name(policy)} gives other log-probs in training mode than in evaluation: it has dropout or noise that "
        "cannot be switched off here; set its probabilities to 0 in the model's config.json"
    )


def _unchanged(policy: Policy, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Equal to the bit. With experts, another token's route changes the shapes of matrix products, so to rounding."""
    if not has_experts(policy.config):
        return torch.equal(before, after)
    return bool((before - after).abs().max() <= _EXPERT_ROUNDING[policy.compute_dtype])


def has_experts(config) -> bool:
    """Whether a transformers config is of a mixture of experts."""
    text = config.get_text_config()
    parts = [text, *(getattr(text, name, None) for name in text.sub_configs)]
    return any(_num_experts(part) > 1 for part in parts if part is not None)


def _num_experts(config) -> int:
    return largest(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _inequality(policy: Policy, groups, packed: torch.Tensor) -> Fault | None:
    """Packs are held to the model's own eager forward in float32, with twice the error of that forward in bfloat16."""
    sequences = [(g.prompt_ids, r) for g in groups for r in g.response_ids]
    with eager_attention(policy):
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
    difference = f"largest difference {worst:.3g} nats per token"
    where = "in rows" if policy.layout.in_rows else "on packs"
    words = f"{_name(policy)} gives different log-probs {where} than on single sequences ({difference})"
    return _placed(policy, groups, words)


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
