"""One family on trial: packs against the model's own eager forward, and against what the start-up check says."""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from engine.config.schema import KernelName, ModelConfig
from engine.data.groups import PreferenceGroup
from engine.errors import UserError
from engine.model import Policy, check_packing, load_policy
from engine.model.checks import has_experts
from engine.model.kernels.choice import fuse_blocks
from engine.model.layouts import count_mixers
from engine.model.policy import Layout
from engine.packing import build_batch
from tests.conformance.families import LONG, VOCAB, tiny_config, tiny_model

LOGPS_BOUND, GRAD_BOUND = 2e-4, 2e-3
"""Largest difference of a token's log-prob, in nats, and of a gradient, relative to its largest element."""

LAYOUTS = {"shared": "shared", "mixers": "mixers in rows", "rows": "rows", "single": "one row"}
EQUAL, REFUSED, NOT_BUILT, FAILS, WRONG = "equal", "refused", "not built", "fails", "SILENTLY WRONG"
NOT_CAUSAL = "not causal"


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    model_type: str
    class_name: str
    verdict: str
    logps_error: float | None = None
    """Largest difference from the oracle, shared and unshared, in nats; None where the model did not run on packs."""
    grad_error: float | None = None
    isolated: bool | None = None
    local: bool = False
    """Whether the family has attention of limited reach, and the trial's short reach changed its logits."""
    dropouts: int = 0
    """How many probabilities the engine set to 0."""
    reason: str = ""
    """The error that a user gets, what keeps the family from being tried, or what the next better layout failed on."""
    layout: str = ""
    """One of ``LAYOUTS``; nothing where none is exact."""
    mixers: str = ""
    """The modules that get rows, and how many there are of each."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Expected(NamedTuple):
    """What the oracle gives: log-probs, and the gradients of a weighted sum of them."""

    logps_N: torch.Tensor
    grads: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Measured:
    logps_error: float
    grad_error: float
    isolated: bool

    @property
    def right(self) -> bool:
        return self.logps_error <= LOGPS_BOUND and self.grad_error <= GRAD_BOUND and self.isolated


def try_family(model_type: str, kernels: KernelName = "none") -> Result:
    """Build a family, measure it, and hold its start-up check to what was measured.

    With ``kernels`` its blocks are computed by them from the check on; where that is refused, so is the family.

    The check runs on the model with short windows and on one whose windows are longer than any sequence of the check:
    it must not be the probe's luck that a wrong model is found.
    """
    torch.set_num_threads(1)
    task = "its tiny model is not built"
    try:
        model = tiny_model(tiny_config(model_type))
        long = tiny_model(tiny_config(model_type, reach=LONG))
        task = "its own forward and backward do not take one sequence of text tokens"
        expected = _expected(model)
    except Exception as error:
        return Result(model_type, _class_name(model_type), NOT_BUILT, reason=f"{task}: {first_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        return _judge(model_type, model, long, expected, Path(folder), kernels)


def _expected(model: nn.Module) -> Expected:
    try:
        return one_by_one(model, sample_groups())
    except AssertionError:
        # Reversible layers have a backward pass in training mode alone.
        return one_by_one(model.train(), sample_groups())


def _judge(
    model_type: str, model: nn.Module, long: nn.Module, expected: Expected, folder: Path, kernels: KernelName
) -> Result:
    name = type(model).__name__
    reasons: list[str] = []
    layouts: list[Layout] = []
    measured: Measured | None = None
    dropouts, mixers = 0, ""
    for label, candidate in (("short", model), ("long", long)):
        try:
            policy = _load(candidate, folder / label)
            check_packing(policy)
            fuse_blocks(policy, kernels)
        except UserError as error:
            reasons.append(str(error).replace(str(folder / label), model_type))
            continue
        layouts.append(policy.layout)
        if label == "short":
            dropouts, mixers = policy.disabled_dropouts, count_mixers(policy.causal_lm, policy.layout.mixers)
            measured = _measure(policy, expected)
    numbers = (measured.logps_error, measured.grad_error, measured.isolated) if measured else (None, None, None)
    behind = _reads_behind(model)
    if len(reasons) == 2:
        verdict = NOT_CAUSAL if behind > LOGPS_BOUND else REFUSED
    elif measured is not None and not (measured.right and behind <= LOGPS_BOUND):
        verdict = WRONG
    elif reasons or measured is None or len({layout[:2] for layout in layouts}) > 1:
        verdict = FAILS
    else:
        verdict = EQUAL
    if verdict == NOT_CAUSAL:
        words = f"in its own eager forward the log-prob of a token changes by up to {behind:.2g} nats with the tokens"
        reasons[0] = f"{words} behind it; {reasons[0]}"
    local = not torch.equal(*(_own_logits(m, torch.arange(8, 40)) for m in (model, long)))
    kind = LAYOUTS[layouts[0].kind] if layouts else ""
    reason = reasons[0] if reasons else next((layout.reason for layout in layouts), "")
    return Result(model_type, name, verdict, *numbers, local, dropouts, reason, kind, mixers)


def _load(model: nn.Module, folder: Path) -> Policy:
    """The engine's own way from a folder to a policy, with the very weights of ``model``."""
    model.save_pretrained(folder)
    policy = load_policy(ModelConfig(model_name_or_path=str(folder), dtype="float32"), device=torch.device("cpu"))
    policy.causal_lm.load_state_dict(model.state_dict())
    return policy


def _measure(policy: Policy, expected: Expected) -> Measured | None:
    """Packs in training mode against plain sequences, or None where packs do not run."""
    groups = sample_groups()
    policy.train()
    try:
        errors = [_packed_errors(policy, groups, expected, shared) for shared in _sharing(policy)]
        isolated = _isolated(policy, groups)
    except Exception:
        return None
    return Measured(max(e[0] for e in errors), max(e[1] for e in errors), isolated)


def _sharing(policy: Policy) -> tuple[bool, ...]:
    """Whether packs share prompts: tried both ways, but for whole models in rows, which never get such packs."""
    return (False,) if policy.layout.in_rows else (True, False)


def sample_groups() -> list[PreferenceGroup]:
    """Two and three responses, lengths from 1 to beyond ``SHORT``, tokens that mean nothing special."""
    generator = np.random.default_rng(3)

    def ids(count: int) -> np.ndarray:
        return generator.integers(8, VOCAB, count, dtype=np.int32)

    shapes = [(9, (8, 24)), (1, (2, 9)), (6, (1, 7, 3))]
    return [
        PreferenceGroup(row, ids(prompt), tuple(ids(n) for n in responses))
        for row, (prompt, responses) in enumerate(shapes)
    ]


def _own_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits
    if logits.shape[:2] != (1, len(ids)):
        raise ValueError(f"its logits have shape {tuple(logits.shape)} for {len(ids)} tokens: not a model of one text")
    return logits[0].float()


@torch.no_grad()
def _reads_behind(model: nn.Module) -> float:
    """How much log-probs of tokens change, in nats, when others take the place of the last tokens of a sequence."""
    ids = torch.arange(8, 40)
    changed = torch.cat([ids[:16], ids[16:] + 50])
    before, after = (_own_logits(model, x)[:15].log_softmax(-1) for x in (ids, changed))
    return _largest(before - after)


def one_by_one(oracle: nn.Module, groups: list[PreferenceGroup]) -> Expected:
    """The model's own forward and backward on each sequence."""
    pieces = []
    for group in groups:
        for response in group.response_ids:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]).astype(np.int64))
            rows = _own_logits(oracle, ids)[len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            pieces.append(rows.gather(1, ids[len(group.prompt_ids) :, None])[:, 0])
    logps_N = torch.cat(pieces)
    (_weights(len(logps_N)) * logps_N).sum().backward()
    return Expected(logps_N.detach(), _gradients(oracle))


def _weights(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1))


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _packed_errors(policy, groups, expected: Expected, share_prompts: bool) -> tuple[float, float]:
    policy.zero_grad()
    logps_N = policy.logps(build_batch(groups, share_prompts=share_prompts))
    (_weights(len(logps_N)) * logps_N).sum().backward()
    grads = _gradients(policy.causal_lm)
    worst = 0.0
    for name, want in expected.grads.items():
        got = grads.get(name, torch.zeros_like(want))
        worst = max(worst, _largest(got - want) / max(1.0, _largest(want)))
    return _largest(logps_N.detach() - expected.logps_N), worst


def _largest(x: torch.Tensor) -> float:
    value = x.abs().max().item()
    return value if np.isfinite(value) else float("inf")


def _isolated(policy: Policy, groups: list[PreferenceGroup]) -> bool:
    """Whether other tokens in the second response leave every other response's log-probs as they are."""
    first = groups[0]
    changed = (first.response_ids[1] - 8 + 1) % (VOCAB - 8) + 8
    others = [replace(first, response_ids=(first.response_ids[0], changed.astype(np.int32))), *groups[1:]]
    bound = 1e-4 if has_experts(policy.config) else 0.0
    with torch.no_grad():
        batch, other = (build_batch(g, share_prompts=_sharing(policy)[0]) for g in (groups, others))
        before, after = policy.logps(batch), policy.logps(other)
    start, stop = batch.cu_responses_S1[1:3].tolist()
    difference = (before - after).abs()
    difference[start:stop] = 0.0
    return bool(difference.max() <= bound)


def _class_name(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().endswith(":")]
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {lines[0] if lines else error!r}")
