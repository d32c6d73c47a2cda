"""How fast this machine trains a model, tried out: real steps on its first layers, with random weights.

A pack takes time for what does not depend on depth (embedding, head, loss) and for each layer. One layer and two give
both, where all layers but the first are alike. A pack of the plan is cut to what takes about a second, and models are
left alone whose first layers would take much of the memory that is free.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset
from ..data.lengths import GroupLengths
from ..model import Policy, load_policy
from ..packing import PackedBatch, Step, build_batch, group_sizes
from ..train.objective import Objective
from ..train.optimizer import build_optimizer
from ..train.throughput import FlopModel, synchronize
from .memory import step_of

_SECONDS = 0.5
"""What a trial of all layers that are tried may take at the rate of matrix products."""
_REPEATS = 3
_MEMORY_SHARE = 0.25
_BYTES_PER_WEIGHT = 16
"""Weight, gradient and two moments, in float32."""


@dataclass(frozen=True)
class Trial:
    """What was measured."""

    pack_flop_per_second: float
    """FLOP that the mathematics of a pack needs in the whole model, by the seconds that the pack takes there."""
    update_seconds_per_weight: float
    """Of the optimizer."""
    tokens: int
    """Of the pack."""


def try_out(
    config: RunConfig,
    dataset: PreferenceDataset,
    steps: Sequence[Step],
    flops: FlopModel,
    *,
    device: torch.device,
    matmul_rate: float,
) -> Trial:
    """Train on one pack of the plan.

    Args:
        flops: of the whole model.

    Raises:
        MemoryError: the first layers would take too much of what is free.
        ValueError: layers differ in size, or the machine was too busy to tell one layer from two.
        Exception: whatever a model raises that cannot be built with fewer layers.
    """
    with torch.device("meta"):
        whole = _policy(config, device, None)
        depth = whole.config.get_text_config().num_hidden_layers
        tried = (1, 2) if depth > 1 else (1,)
        *_, largest = shallow = [_policy(config, device, layers) for layers in tried]
    sizes = [sum(p.numel() for p in policy.parameters()) for policy in (*shallow, whole)]
    if sizes[-1] != sizes[0] + (depth - 1) * (sizes[-2] - sizes[0]):
        raise ValueError("the later layers are not like the second one")
    needed, free = _BYTES_PER_WEIGHT * sizes[-2], _free_bytes(device)
    if needed > _MEMORY_SHARE * free:
        raise MemoryError(f"two layers would take {needed / 2**30:.1f} of {free / 2**30:.1f} GiB that are free")
    share, first_layers = config.packing.share_prompts, FlopModel.of(largest)
    pack = _typical_pack(steps)
    while len(pack) > 1 and _flop(dataset, pack, first_layers, share_prompts=share) > _SECONDS * matmul_rate:
        pack = pack[: -max(1, len(pack) // 8)]
    batch = build_batch([dataset[i] for i in pack], share_prompts=share)
    seconds, update = zip(*(_measure(config, batch, device, layers) for layers in tried), strict=True)
    layer = seconds[-1] - seconds[0]
    if depth > 1 and layer <= 0:
        raise ValueError("the second layer took no time in the trial")
    pack_seconds = seconds[0] + (depth - 1) * layer
    return Trial(_flop(dataset, pack, flops, share_prompts=share) / pack_seconds, update[-1], batch.num_tokens)


def _policy(config: RunConfig, device: torch.device, layers: int | None) -> Policy:
    policy = load_policy(
        config.model,
        device=device,
        gradient_checkpointing=config.train.gradient_checkpointing,
        empty=True,
        layers=layers,
    )
    policy.activation_offload = config.train.activation_offload
    return policy.train()


def _measure(config: RunConfig, batch: PackedBatch, device: torch.device, layers: int) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimizer per trained weight."""
    with torch.device(device):
        policy = _policy(config, device, layers)
    objective = Objective(config.loss, token_metrics=config.train.token_metrics)
    optimizer, _ = build_optimizer(policy.model, config.optim)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    step = step_of(batch, objective, device)
    passes, updates = [], []
    for _ in range(_REPEATS):
        marks = [_now(device)]
        objective.backward(policy, step)
        marks.append(_now(device))
        optimizer.step()
        marks.append(_now(device))
        optimizer.zero_grad()
        passes.append(marks[1] - marks[0])
        updates.append(marks[2] - marks[1])
    # The first round warms up.
    return min(passes[1:]), min(updates[1:]) / trained


def _typical_pack(steps: Sequence[Step]) -> tuple[int, ...]:
    """The pack whose number of groups is the median."""
    packs = sorted((pack for step in steps for pack in step), key=lambda pack: (len(pack), pack))
    return packs[len(packs) // 2]


def _flop(dataset: PreferenceDataset, pack: Sequence[int], flops: FlopModel, *, share_prompts: bool) -> float:
    lengths = GroupLengths.of([dataset.lengths[i] for i in pack])
    tokens = int(group_sizes(lengths, share_prompts=share_prompts).sum())
    visible = int(lengths.visible_pairs(share_prompts=share_prompts).sum())
    return flops.step(tokens, int(lengths.completions.sum()), visible)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
