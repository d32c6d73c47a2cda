"""From the name of a model to a policy that is ready for the packs of some data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..config.schema import ModelConfig, PackingConfig, TrainConfig
from ..config.training import Recomputed
from ..data.groups import PreferenceDataset
from ..seeds import seed_generators
from .backward import check_backward
from .checks import check_packing
from .fresh import check_fresh, score_fresh
from .kernels.choice import fuse_blocks, use_kernels
from .kernels.exchange import Kernels
from .layouts import use_layout
from .load import load_policy
from .policy import Layout, Policy
from .readable import check_dataset
from .shard import shard_policy


def load_sharded(
    model: ModelConfig,
    device: torch.device,
    *,
    gradient_checkpointing: Recomputed = False,
    activation_offload: bool = False,
    layout: Layout | None = None,
    kernels: Kernels | None = None,
    change: Callable[[Policy], None] | None = None,
    weights_dtype: str = "float32",
) -> Policy:
    """Load a model and spread it over the processes of the run. Every rank must call it.

    Args:
        layout: how it computes packs, where that is known.
        kernels: what computes its blocks, where that is known.
        change: is given the policy before its layers are sharded.
        weights_dtype: as in ``load_policy``.

    Raises:
        UserError: the model cannot be loaded, lacks what packs need, or cannot be spread.
    """
    policy = load_policy(
        model, device=device, gradient_checkpointing=gradient_checkpointing, weights_dtype=weights_dtype
    )
    if change is not None:
        change(policy)
    policy = shard_policy(policy, device)
    policy.activation_offload = activation_offload
    if layout is not None:
        use_layout(policy, layout)
    if kernels is not None:
        use_kernels(policy, kernels)
    return policy


def ready_policy(
    model: ModelConfig,
    device: torch.device,
    datasets: Sequence[PreferenceDataset],
    *,
    packing: PackingConfig,
    train: TrainConfig | None = None,
    change: Callable[[Policy], None] | None = None,
    compare: bool = True,
    weights_dtype: str = "float32",
) -> Policy:
    """Load a model, spread it over the processes of the run, and find out whether it can be used. Every rank must call
    it.

    Args:
        datasets: what it will be used on.
        packing: how their rows will be laid out. What it leaves open, ``policy.layout`` then says.
        train: of a policy that will be trained: how it saves memory, and the seed that new adapters start from. None
            leaves the generators of random numbers as they are.
        change: as in ``load_sharded``.
        compare: whether an adapter is compared with what transformers and peft alone make of it, on rows of the first
            dataset; for a policy that ``change`` leaves as the model is.
        weights_dtype: as in ``load_policy``.

    Raises:
        UserError: as in ``load_sharded``; the model gives other numbers on packs than on its own, or cannot be trained
            on them; the data does not fit its vocabulary or length; or the adapter is not loaded rightly.
    """
    fresh = score_fresh(model, datasets[0], device) if compare else None
    memory: dict[str, Any] = {}
    if train is not None:
        seed_generators(train.seed)
        memory = {
            "gradient_checkpointing": train.gradient_checkpointing,
            "activation_offload": train.activation_offload,
        }
    policy = load_sharded(model, device, change=change, weights_dtype=weights_dtype, **memory)
    check_packing(policy, share_prompts=packing.share_prompts, requested=packing.layout)
    if train is not None:
        check_backward(policy, share_prompts=packing.share_prompts)
    fuse_blocks(policy, model.kernels, share_prompts=packing.share_prompts)
    for dataset in datasets:
        check_dataset(policy, dataset)
    check_fresh(policy, fresh)
    return policy
