"""Policies without data, and what their weights and optimizer state take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..config.schema import OptimConfig, RunConfig
from ..model import Policy, load_policy
from ..model.head import output_layer
from ..train.bfloat16 import PIECE, kernels_for
from ..train.held_weights import TOGETHER
from ..train.optimizer import build_optimizer, updates_at_once
from ..train.row_blocks import BLOCK, LEAST_PAGED, blocks_of_row, is_eight_bits, moment_bytes, wide_parameters
from ..train.row_blocks import PIECE as ROWS_PIECE
from .live_storage import LiveStorage, storage_bytes
from .sharding import largest_share
from .target import DeviceKind, Target

_PROBE_WIDTH = 128
_SCALED_BLOCK, _SCALES_BLOCK = 64, 256
"""Weights of 4 bits that share a scale of 8 bits, and such scales that share one of 32 bits."""
_PADDED_BYTES = 10
"""Weight and gradient in float32, and two moments of 8 bits."""
_WIDENED_BYTES, _ROUNDED_BYTES = 8, 32
"""Of weights in bfloat16 that are updated together: weight and gradient in float32; and of those that operators of
torch round together, what that takes. Kernels take nothing."""


def without_memory(config: RunConfig, target: Target, layers: int | None = None) -> Policy:
    """The policy as a run loads it, on the meta device, with so many of its layers.

    Quantised weights stand there in the compute dtype, which is what they are computed in.

    Raises:
        UserError: it cannot be built.
    """
    with torch.device("meta"):
        return load_policy(
            replace(config.model, quantization=None),
            device=target.device,
            gradient_checkpointing=config.train.gradient_checkpointing,
            empty=True,
            layers=layers,
            weights_dtype=config.optim.weights_dtype,
            backend=target.backend(config),
        )


def policy_without_data(config: RunConfig, target: Target, layers: int | None = None) -> Policy:
    """The same of tensors that have all but data, in training mode."""
    policy = without_memory(config, target, layers)
    # Tied weights stay one tensor.
    made: dict[int, Tensor] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                empty = torch.empty_like(parameter, device=target.device)
                made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty_like(buffer, device=target.device))
    policy.activation_offload = config.train.activation_offload
    if target.absent:
        policy.offload_host = torch.device("meta")
    return policy.train()


def quantized_weights(policy: Policy) -> list[nn.Parameter]:
    """What bitsandbytes holds in 4 bits: the frozen weights of linear layers but the head."""
    head = output_layer(policy.causal_lm)
    layers = (m for m in policy.causal_lm.modules() if isinstance(m, nn.Linear) and m is not head)
    return [w for layer in layers if isinstance(w := layer.weight, nn.Parameter) and not w.requires_grad]


def quantized_bytes(weight: nn.Parameter) -> int:
    """Bytes of a weight in 4 bits whose scales are quantised, too."""
    scales = -(-weight.numel() // _SCALED_BLOCK)
    return -(-weight.numel() // 2) + scales + 4 * -(-scales // _SCALES_BLOCK)


def state_bytes(config: OptimConfig, policy: Policy, *, kind: DeviceKind, shards: int = 1) -> tuple[list[int], int]:
    """What the optimizer keeps on the device for each trained parameter, and the most that an update holds beside it.

    Moments that a GPU pages are in host memory where it is full, so they count nothing. Offloaded state is there, too,
    where the host is not the device; what is updated together is on the device meanwhile.

    Args:
        shards: processes of which each keeps and updates its share.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    plain = replace(config, optimizer="adamw") if "8bit" in config.optimizer or "paged" in config.optimizer else config
    state, update = _measured_state(plain, trained, kind, shards)
    numbers = [largest_share(p.numel(), p, shards) for p in trained]
    wide = {id(p) for p in wide_parameters(policy)}
    in_eight = ["8bit" in config.optimizer and is_eight_bits(p.shape) and id(p) not in wide for p in trained]
    if "8bit" in config.optimizer:
        state = [largest_share(moment_bytes(p.shape, wide=id(p) in wide), p, shards) for p in trained]
        update += max(
            (_padding(p.shape, shards) for p, eight in zip(trained, in_eight, strict=True) if eight), default=0
        )
    if config.optimizer.startswith("paged") and kind == "cuda":
        # Scales of 8 bits stay on the device, and so does what is small.
        moments = [2 * n * (1 if eight else 4) * (n >= LEAST_PAGED) for n, eight in zip(numbers, in_eight, strict=True)]
        state = [size - paged for size, paged in zip(state, moments, strict=True)]
    if config.master_weights == "kahan":
        state = [size + 2 * n for size, n in zip(state, numbers, strict=True)]
    if config.offload and kind == "cuda":
        fetched = max(*state, min(sum(state), TOGETHER * max(state) // max(numbers)))
        return [0] * len(trained), update + fetched
    return state, update


def stored_bytes(config: RunConfig, policy: Policy, *, shards: int = 1) -> int:
    """What a process writes of a checkpoint: what is trained, a reference that moves, the optimizer's state, wherever
    these lie."""
    resident: Any = config.optim.optimizer.removeprefix("paged_")
    optim = replace(config.optim, offload=False, optimizer=resident)
    stored = [p for p in policy.parameters() if p.requires_grad or not policy.has_adapter]
    models = 2 if config.reference.sync_ref_model else 1
    weights = sum(largest_share(p.nbytes, p, shards) for p in stored)
    return models * weights + sum(state_bytes(optim, policy, kind="cpu", shards=shards)[0])


def _padding(shape: torch.Size, shards: int) -> int:
    """What rows that are no whole blocks of 8-bit moments are copied into, some at a time."""
    width = blocks_of_row(shape) * BLOCK
    if width == math.prod(shape[1:]):
        return 0
    return _PADDED_BYTES * width * min(-(-shape[0] // shards), max(1, ROWS_PIECE // width))


def _measured_state(
    config: OptimConfig, trained: Sequence[nn.Parameter], kind: DeviceKind, shards: int
) -> tuple[list[int], int]:
    """Of one update of a small layer, by the optimizer as it runs on a kind of device, which need not be there."""
    with unset_fake_temporarily():
        device = trained[0].device
        layer = nn.Linear(_PROBE_WIDTH, _PROBE_WIDTH, bias=False, device=device)
        optimizer, _ = build_optimizer(layer, replace(config, master_weights="float32", offload=False))
        at_once = updates_at_once(config, kind)
        for group in optimizer.param_groups:
            group["foreach"] = at_once
        layer.weight.grad = torch.zeros_like(layer.weight)
        count = LiveStorage(device, lambda func, args: 0)
        with count:
            optimizer.step()
        tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim]
        state = storage_bytes(tensors)
    numbers = [largest_share(p.numel(), p, shards) for p in trained]
    unit = layer.weight.numel()
    kept = [state * n // unit for n in numbers]
    together = sum(numbers) if at_once else max(numbers)
    if config.master_weights != "float32" or config.offload:
        together = max(*numbers, min(sum(numbers), TOGETHER))
    update = max(0, count.peak - state) * together // unit
    if config.master_weights != "float32":
        rounded = _ROUNDED_BYTES * min(together, PIECE) if kernels_for(torch.device(kind)) is None else 0
        update = _WIDENED_BYTES * together + max(update, rounded)
    return kept, update
