"""The dtype that a model is stored in, and what rounding to it costs.

Training holds its weights in float32, unless ``optim.master_weights`` says otherwise. Stored in bfloat16 they move to
its nearest numbers, which lie farther apart than a run at a low learning rate moves them: most weights would be what
they were before training. So rounding is only done where it is asked for (``train.save_dtype``), and then measured on
the weights that are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset
from ..model import Policy
from ..packing import Pack
from ..run_folder import AS_TRAINED, eval_prefixes
from .bfloat16 import carried
from .by_source import without_sources
from .describe import rounding_words
from .evaluation import evaluate_policy, evaluate_splits, scalar_metrics
from .setup import Setup
from .storage import stored_dtypes

_SAMPLE_ROWS = 64
_CHUNK = 1 << 22


class RoundingCost(NamedTuple):
    """What rounding changed."""

    values: dict[str, float]
    """The evaluation of the written weights, and below ``AS_TRAINED`` that of the trained ones."""
    text: str
    """One sentence of both."""


def round_weights(policy: Policy, config: RunConfig) -> None:
    """Give the weights the values that they are stored with; they keep their dtype, so the model goes on as before.

    Every rank must call this. The same weights, seed and ``train.save_rounding`` give the same bits on any number of
    processes and any device.
    """
    dtypes = stored_dtypes(policy, config)
    done: set[int] = set()
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if dtypes.get(name) != torch.bfloat16 or id(tensor) in done:
            continue
        done.add(id(tensor))
        generator = None
        if config.train.save_rounding == "stochastic":
            seed = blake2b(f"{config.train.seed}/{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        distributed.copy_full(tensor, rounded(distributed.full_tensor(tensor.detach()), generator))


def rounded(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``values`` in their own dtype, float32, rounded to numbers of bfloat16.

    Args:
        generator: of the CPU; each value then goes up or down with the probability that keeps its expectation, so that
            a sum of many is kept. None rounds to nearest.
    """
    if generator is None:
        return values.bfloat16().to(values.dtype)
    flat = values.float().reshape(-1)
    result = torch.empty_like(flat)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        noise = torch.randint(0, 1 << 16, part.shape, generator=generator, dtype=torch.int32).to(part.device)
        result[start : start + _CHUNK] = carried(part, noise)
    return result.reshape(values.shape).to(values.dtype)


def round_and_measure(setup: Setup, evaluation: Mapping[str, float]) -> RoundingCost | None:
    """Round weights as ``train.save_dtype`` asks, and evaluate them before and after; None where nothing is rounded.

    Without evaluation data, some training rows stand in for it: the numbers then only say what rounding costs.

    Args:
        evaluation: that of the trained weights; empty without evaluation data.
    """
    config, policy = setup.config, setup.policy
    if torch.bfloat16 not in stored_dtypes(policy, config).values():
        return None
    name = "held-out pairs" if setup.held_out else "pairs of the training data"

    def measure(stoppable: bool) -> dict[str, float]:
        rows = (policy, setup.datasets, setup.objective, config)
        if setup.held_out:
            return evaluate_splits(*rows, lookup=setup.references.lookup, stoppable=stoppable)
        dataset, lookup = _training_rows(setup)
        return evaluate_policy(policy, dataset, setup.objective, config, lookup=lookup, stoppable=stoppable)

    before = dict(evaluation) or measure(stoppable=True)
    round_weights(policy, config)
    # No checkpoint can be written of what was rounded: from here on the model is finished.
    after = measure(stoppable=False)
    trained = {AS_TRAINED + k.removeprefix("eval_"): v for k, v in without_sources(scalar_metrics(before)).items()}
    words = (_both(before, after, prefix, name) for prefix in eval_prefixes(after))
    return RoundingCost({**after, **trained}, f"{rounding_words(config)}: {'; '.join(words)}")


def _both(before: Mapping[str, float], after: Mapping[str, float], prefix: str, what: str) -> str:
    """Before and after in words, of the evaluation set whose metrics begin with ``prefix``."""
    names = {"margin": "rewards/margins", "accuracy": "rewards/accuracies", "loss": "loss"}
    numbers = (
        f"{word} {before[prefix + name]:.6g} as trained and {after[prefix + name]:.6g} as written"
        for word, name in names.items()
        if prefix + name in after
    )
    own = prefix.removeprefix("eval_").removesuffix("_")
    count = int(after[f"{prefix}num_pairs"])
    return f"{', '.join(numbers)} on {count:,} {what}" + (f" of {own}" if own else "")


def _training_rows(setup: Setup) -> tuple[PreferenceDataset, Callable[[Pack], np.ndarray] | None]:
    """Evenly spaced training rows, and their references."""
    dataset, stored = setup.datasets["train"], setup.references.lookup("train")
    places = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLE_ROWS).astype(int)).tolist()
    sample = PreferenceDataset(dataset[i] for i in places)
    lookup = None if stored is None else (lambda pack: stored(tuple(places[i] for i in pack)))
    return sample, lookup


def gather_weights(policy: Policy, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The whole state of a model, or of its trained adapter, in the dtypes that it is stored in.

    It is gathered in the CPU's memory of rank 0, a tensor at a time; the others get empty tensors. Every rank must call
    this. Tied weights are one tensor.
    """
    weights: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if policy.has_adapter and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            full = distributed.full_tensor(tensor.detach())
            kept = full if distributed.is_main() else full.new_zeros(0)
            seen[id(tensor)] = kept.to("cpu", dtypes.get(name), copy=True)
        weights[name] = seen[id(tensor)]
    return weights
