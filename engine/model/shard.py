"""FSDP2: the parameters of a policy spread over the processes of a run.

Each transformer block is one unit, gathered around its forward and its backward. Embedding and head are a unit each,
the head gathered around the loss alone, which runs in a forward method of the head; tied, they stay with the rest of
the model. Gradients are summed, not averaged: the loss of a step is already divided by its pairs over all ranks. They
are summed after every pack, since to keep a whole model's gradients on every rank would undo the sharding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from engine import distributed
from engine.errors import UserError
from engine.model.policy import Policy


def shard_policy(policy: Policy, device: torch.device) -> Policy:
    """Spread a policy that every process holds whole, on the CPU, over ``device`` of each; alone, leave it as it is."""
    if distributed.size() == 1:
        return policy
    if getattr(policy.causal_lm, "hf_quantizer", None) is not None:
        raise UserError(
            "model.quantization runs in one process: quantised weights cannot be sharded; set it to null, the weights "
            "are spread over the processes"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (distributed.size(),))
    # Parameters are gathered as they are kept, and cast where autocast casts them in one process: the same numbers.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Outside a pass everything lies sharded, the root too: optimizer, checkpoints and digests read it there.
    shard = partial(fully_shard, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    for block in transformer_blocks(policy.causal_lm):
        shard(block)
    model: Any = policy.causal_lm
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        shard(embedding)
        shard(head)
        head.run_objective = policy.run_objective
        register_fsdp_forward_method(head, "run_objective")
        policy.run_objective = head.run_objective  # type: ignore[method-assign]
    shard(policy)
    register_fsdp_forward_method(policy, "plain_logits")
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    policy.sharded = True
    return policy


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers itself never splits over devices, innermost first."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names][::-1]
