"""Is a reference with an adapter what transformers and peft alone make of the same files?

Every other start-up check compares what this package has loaded with itself. This one loads the adapter and its base a
second time, plainly, scores a few rows one response at a time, and frees it before the model that trains is loaded.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import distributed
from ..config.schema import ModelConfig
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..errors import UserError, out_of_memory
from ..packing import build_batch
from .adapter_forms import READ_ERRORS
from .adapters import quiet_loading
from .composites import read_causal_lm
from .load import DTYPES
from .policy import Policy
from .precision import TOKEN_TOLERANCE, float32_weights
from .quantization import quantization_arguments, read_by_each, use_one_product
from .sources import first_line, hide_weight_bars, hub_options

_ROWS = 2
_SMALLEST_SHARE = 0.1
_OWN_ERRORS = 2
"""How many times the error of the plain model, in the same dtype, packs may have."""


class FreshScores(NamedTuple):
    """What a plain load gives."""

    groups: list[PreferenceGroup]
    """The shortest rows, two responses each."""
    sums_S: np.ndarray | None
    """float64 [S]: log-prob of every response, in float32 where the model runs so; None where there is nothing to
    compare."""
    errors_S: np.ndarray | None = None
    """float64 [S]: how far the model is from that when it computes in its own dtype."""
    trouble: str | None = None
    """Why it does not load."""


def score_fresh(model: ModelConfig, dataset: PreferenceDataset, device: torch.device) -> FreshScores | None:
    """Scores of a few rows by an adapter on its base, from transformers and peft alone; None without an adapter.

    To be called before the model is loaded that is compared with it: nothing of it stays in memory. Of several
    processes rank 0 does it, on the CPU, where it is to hold the whole model anyway.
    """
    if model.adapter_name_or_path is None:
        return None
    shortest = np.argsort(dataset.lengths.packed(share_prompts=True), kind="stable")[:_ROWS].tolist()
    rows = [dataset[i] for i in shortest]
    groups = [replace(group, response_ids=group.response_ids[:2], pairs=None) for group in rows]
    found = FreshScores(groups, None)
    distributed.announce("scores rows with a plain load of the adapter")
    if distributed.is_main():
        found = _score(model, groups, device if distributed.size() == 1 or read_by_each(model) else torch.device("cpu"))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return distributed.broadcast(found)


def check_fresh(policy: Policy, scores: FreshScores | None) -> None:
    """Compare a policy, and its reference, with what ``score_fresh`` found of the same adapter.

    Args:
        policy: before its first optimizer step.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    if scores is None:
        return
    name = "the adapter on its base"
    if scores.trouble is not None:
        raise UserError(f"start-up check: transformers and peft alone do not load {name}: {scores.trouble}")
    if scores.sums_S is None or scores.errors_S is None:
        return
    batch = build_batch(scores.groups, share_prompts=not policy.layout.in_rows).to(policy.device)
    lengths = batch.lengths_S.cpu().numpy()
    training = policy.training
    policy.eval()
    try:
        for words, mode in (("the model", nullcontext()), ("its reference", policy.reference_mode())):
            with torch.no_grad(), mode:
                logps_N = policy.logps(batch).double().cpu().numpy()
            sums_S = np.add.reduceat(logps_N, batch.cu_responses_S1[:-1].tolist())
            distance_S = np.abs(sums_S - scores.sums_S) / lengths
            rounding_S = TOKEN_TOLERANCE[policy.compute_dtype] * np.maximum(_SMALLEST_SHARE, lengths**-0.5)
            allowed_S = np.maximum(rounding_S, _OWN_ERRORS * scores.errors_S / lengths)
            # Written so that a comparison with NaN counts as different.
            if not (distance_S <= allowed_S).all():
                worst = int(np.argmax(distance_S))
                raise UserError(
                    f"start-up check: {words} gives a response of row {_row(scores.groups, worst)} the log-prob "
                    f"{sums_S[worst]:.2f}, and transformers and peft alone, on a fresh load of {name}, give "
                    f"{scores.sums_S[worst]:.2f}: the adapter is of a form that is not loaded rightly here; merge it "
                    "into its base with peft's merge_and_unload and train on that"
                )
    finally:
        policy.train(training)


def _row(groups: list[PreferenceGroup], response: int) -> int | str:
    return [group.label for group in groups for _ in group.response_ids][response]


def _score(model: ModelConfig, groups: list[PreferenceGroup], device: torch.device) -> FreshScores:
    sequences = [(g.prompt_ids, r) for g in groups for r in g.response_ids]
    try:
        loaded = _load(model, device)
        if max(int(ids.max()) for pair in sequences for ids in pair) >= loaded.get_input_embeddings().weight.shape[0]:
            # A later check names the row.
            return FreshScores(groups, None)
        own_S = _sums(loaded, sequences, device)
        exact_S = None if model.dtype == "float32" else _exact_sums(loaded, sequences, device)
    except (*READ_ERRORS, UserError) as error:
        if out_of_memory(error) is not None:
            raise
        return FreshScores(groups, None, trouble=first_line(error))
    if exact_S is None:
        exact_S = own_S
    return FreshScores(groups, exact_S, np.abs(own_S - exact_S))


def _exact_sums(loaded: Any, sequences: list[tuple[np.ndarray, np.ndarray]], device: torch.device) -> np.ndarray | None:
    """As ``_sums``, computed in float32; None where the model does not run so."""
    try:
        with float32_weights(loaded):
            return _sums(loaded, sequences, device)
    except RuntimeError as error:
        if out_of_memory(error) is not None:
            raise
        return None


def _sums(loaded: Any, sequences: list[tuple[np.ndarray, np.ndarray]], device: torch.device) -> np.ndarray:
    with torch.no_grad():
        return np.array([_sum(loaded, prompt, response, device) for prompt, response in sequences])


def _sum(loaded: Any, prompt: np.ndarray, response: np.ndarray, device: torch.device) -> float:
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64)).to(device)
    logits = loaded(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None]).sum().item()


def _load(model: ModelConfig, device: torch.device) -> Any:
    import peft

    assert model.adapter_name_or_path is not None
    dtype = DTYPES[model.dtype]
    options = hub_options(model.model_name_or_path, "model.model_name_or_path=")
    if model.quantization:
        options |= quantization_arguments(model.quantization, device, dtype)
    hide_weight_bars()
    base = read_causal_lm(
        model.model_name_or_path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=dtype,
        **options,
    )
    use_one_product(base)
    with quiet_loading():
        loaded = peft.PeftModel.from_pretrained(base, model.adapter_name_or_path)
    return loaded.to(device).eval()
