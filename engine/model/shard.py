"""The parameters of a policy on the processes of a run: spread over them by FSDP2, or whole on each.

Each transformer block is one unit, gathered around its own forward and backward. Embedding and head are a unit each,
the head gathered around the loss alone, which runs in a forward method of the head; tied, they stay with the rest of
the model. Gradients are summed, not averaged: the loss of a step is already divided by its pairs over all ranks. They
are summed after every pack, since to keep a whole model's gradients on every rank would undo the sharding. Where the
ranks hold several copies of the model between them (``mesh.shards``), shards are gathered and summed within a copy,
and added up over the copies once a step (``replicas.py``).

Rank 0 alone reads the weights. Unit by unit they go to all processes, each of which then keeps its share: none of the
others ever holds more than its shares and one unit (where transformers names no blocks, the whole model is one). What
is in a module beside its parameters comes from rank 0, too. Quantised weights cannot travel so: every process reads
its own, and holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import distributed, mesh
from ..errors import UserError
from .policy import Policy


def shard_policy(policy: Policy, device: torch.device) -> Policy:
    """Spread a policy, of which rank 0 has the weights, over ``device`` of every process; alone, leave it as it is.

    Raises:
        UserError: the weights cannot be spread.
    """
    if distributed.size() == 1:
        return policy
    quantised = getattr(policy.causal_lm, "hf_quantizer", None) is not None
    if mesh.shards() == 1:
        return _copy_policy(policy, device, read_by_each=quantised)
    if quantised:
        raise UserError(
            f"{type(policy.causal_lm).__name__}: its weights are stored quantised, and such weights cannot be sharded; "
            "set train.shards_per_replica to 1, or give a model in bfloat16 or float32"
        )
    if len({p.dtype for p in policy.parameters() if p.requires_grad}) > 1:
        raise UserError(
            f"{type(policy.causal_lm).__name__}: some of its weights stay float32 beside others in bfloat16, and such "
            "are not sharded together; set optim.master_weights to float32, or train.shards_per_replica to 1"
        )
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    shared = mesh.shard_mesh(device.type)
    # Gathered as they are kept, parameters are cast where autocast casts them in one process: the same numbers.
    precision = MixedPrecisionPolicy(mesh.gathered_dtype(), reduce_dtype=torch.float32, cast_forward_inputs=False)

    def shard(unit: nn.Module) -> None:
        _fill(unit, "_parameters", device)
        # Outside a pass everything lies sharded, the root too: optimizer, checkpoints and digests read it there.
        fully_shard(unit, mesh=shared, mp_policy=precision, reshard_after_forward=True)

    _take_layout(policy)
    _fill(policy, "_buffers", device)
    for block in transformer_blocks(policy.causal_lm):
        shard(block)
    model: Any = policy.causal_lm
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}:
        shard(embedding)
        shard(head)
        head.run_objective = policy.run_objective
        register_fsdp_forward_method(head, "run_objective")
        policy.run_objective = head.run_objective  # type: ignore[method-assign]
    shard(policy)
    register_fsdp_forward_method(policy, "plain_logits")
    register_fsdp_forward_method(policy, "plain_routers")
    register_fsdp_forward_method(policy, "generate_ids")
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    policy.sharded, policy.has_copies = True, mesh.copies() > 1
    return policy


def _copy_policy(policy: Policy, device: torch.device, *, read_by_each: bool) -> Policy:
    """Give every process the whole policy, on ``device``, with the bits of rank 0.

    Args:
        read_by_each: whether every process has read the frozen weights itself.
    """
    if read_by_each:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                distributed.broadcast_bytes(parameter.detach())
    else:
        _take_layout(policy)
        _fill(policy, "_buffers", device)
        _fill(policy, "_parameters", device)
    policy.has_copies = True
    return policy


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers itself never splits over devices, innermost first."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names][::-1]


class _Layout(NamedTuple):
    """What a parameter or buffer is, without its values."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool
    owner: str
    """The first name of the same tensor: tied weights have one."""


def _take_layout(policy: Policy) -> None:
    """Give the shapes of this process the dtypes and ties that rank 0 found in the weights.

    Raises:
        UserError: the config describes other shapes than the weights have.
    """
    own = _layout(policy)
    told = distributed.broadcast(own)
    different = [name for name in {**told, **own} if name not in own or name not in told]
    different += [name for name in told if name not in different and told[name].shape != own[name].shape]
    # Tensors are sent one by one, without their names.
    different += [name for name, here in zip(told, own, strict=False) if name != here]
    if different:
        raise UserError(
            f"{type(policy.causal_lm).__name__}: the weights do not have the shapes that the config of the model "
            f"describes ({different[0]}); train in one process, or correct its config.json"
        )
    if distributed.is_main():
        return
    made: dict[str, Tensor] = {}
    for name, tensors, key in _tensors(policy):
        is_parameter, layout = isinstance(tensors[key], nn.Parameter), told[name]
        if layout.owner not in made:
            empty = torch.empty(layout.shape, dtype=layout.dtype, device="meta")
            made[layout.owner] = nn.Parameter(empty, layout.requires_grad) if is_parameter else empty
        tensors[key] = made[layout.owner]


def _layout(policy: Policy) -> dict[str, _Layout]:
    owners: dict[int, str] = {}
    return {
        name: _Layout(tensor.shape, tensor.dtype, tensor.requires_grad, owners.setdefault(id(tensor), name))
        for name, tensors, key in _tensors(policy)
        if (tensor := tensors[key]) is not None
    }


def _tensors(policy: Policy) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
    """Every parameter and buffer: its name, and where it is kept."""
    for prefix, module in policy.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    yield f"{prefix}.{key}", tensors, key  # type: ignore[misc]


def _fill(unit: nn.Module, kind: Literal["_parameters", "_buffers"], device: torch.device) -> None:
    """Bring what rank 0 has of the tensors in ``unit`` that are not sharded yet to ``device`` of every process."""
    filled: dict[int, Tensor] = {}
    for module in unit.modules():
        tensors = getattr(module, kind)
        for key, tensor in tensors.items():
            if tensor is None or hasattr(tensor, "device_mesh"):
                continue
            if id(tensor) not in filled:
                filled[id(tensor)] = _from_main(tensor, device)
            tensors[key] = filled[id(tensor)]


def _from_main(tensor: Tensor, device: torch.device) -> Tensor:
    if distributed.is_main():
        values = tensor.detach().to(device).contiguous()
    else:
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    distributed.broadcast_bytes(values)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
