"""How fast this machine trains a model, tried out: real steps on its first layers, with random weights.

A pack takes time for what does not depend on depth (embedding, head, loss) and for each layer. One layer and two give
both, where all layers but the first are alike; where several kinds of layers take turns, one turn and two do. A pack of
the plan is cut to what takes about a second, and models are left alone whose first layers would take much of the memory
that is free.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset
from ..data.lengths import GroupLengths
from ..model.layouts import use_layout
from ..model.policy import Layout
from ..packing import Step, group_sizes
from ..train.feed import TrainingPack
from ..train.objective import Objective
from ..train.optimizer import build_optimizer
from ..train.throughput import FlopModel, synchronize
from .counting import step_of
from .memory import pack_of
from .shallow import build_policy, check_room, num_parameters

_SECONDS = 0.5
"""What a trial of all layers that are tried may take at the rate of matrix products."""
_REPEATS, _MOST_REPEATS = 3, 30
_SETTLED = 0.3
"""Seconds over which short steps are repeated: the fewest of three of some milliseconds say little."""
_TURNS = (1, 2, 3, 4, 5, 6, 8)
"""Numbers of layers after which a model may repeat."""
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
    layout: Layout,
) -> Trial:
    """Train on one pack of the plan.

    Args:
        flops: of the whole model.
        layout: how packs are computed.

    Raises:
        MemoryError: the first layers would take too much of what is free.
        ValueError: layers differ in size, or the machine was too busy to tell one layer from two.
        Exception: whatever a model raises that cannot be built with fewer layers.
    """
    turn, depth, size, first_layers = _turn(config, device)
    tried = (turn, 2 * turn) if depth > turn else (turn,)
    check_room(_BYTES_PER_WEIGHT * size, "two layers" if turn == 1 else f"{2 * turn} layers", device)
    share = config.packing.share_prompts
    pack = _typical_pack(steps)
    while len(pack) > 1 and _flop(dataset, pack, first_layers, share_prompts=share) > _SECONDS * matmul_rate:
        pack = pack[: -max(1, len(pack) // 8)]
    built = pack_of(config, [dataset[i] for i in pack], layout).to(device)
    seconds, update = zip(*(_measure(config, built, device, layers, layout) for layers in tried), strict=True)
    more = seconds[-1] - seconds[0]
    if depth > turn and more <= 0:
        raise ValueError("the second layer took no time in the trial")
    pack_seconds = seconds[0] + (depth // turn - 1) * more
    return Trial(_flop(dataset, pack, flops, share_prompts=share) / pack_seconds, update[-1], built.batch.num_tokens)


def _turn(config: RunConfig, device: torch.device) -> tuple[int, int, int, FlopModel]:
    """A number of layers of which the whole consists: the first so many, and then as many again several times.

    Returns:
        That number, the number of all layers, and the weights and FLOP of twice that number, or of a single layer.

    Raises:
        ValueError: later layers differ in size from the second ones.
    """
    with torch.device("meta"):
        whole = build_policy(config, device, None)
        size, depth = num_parameters(whole), whole.config.get_text_config().num_hidden_layers
        if depth == 1:
            return 1, 1, size, FlopModel.of(whole)
        for turn in (n for n in _TURNS if n == 1 or (depth % n == 0 and depth >= 3 * n)):
            one, two = (build_policy(config, device, layers) for layers in (turn, 2 * turn))
            first, both = num_parameters(one), num_parameters(two)
            if size == first + (depth // turn - 1) * (both - first):
                return turn, depth, both, FlopModel.of(two)
    raise ValueError("the later layers are not like the second one")


def _measure(
    config: RunConfig, pack: TrainingPack, device: torch.device, layers: int, layout: Layout
) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimizer per trained weight."""
    with torch.device(device):
        policy = build_policy(config, device, layers)
    use_layout(policy, layout)
    objective = Objective(config.loss, token_metrics=config.train.token_metrics)
    optimizer, _ = build_optimizer(policy.model, config.optim)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    step = step_of(pack)
    passes: list[float] = []
    updates: list[float] = []
    while len(passes) < _REPEATS or (len(passes) < _MOST_REPEATS and sum(passes) < _SETTLED):
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


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
