"""Which kernels compute the decoder blocks of a model: tried and compared before they are chosen."""

from __future__ import annotations

from collections.abc import Callable

from ... import distributed
from ...config.schema import KernelName
from ...errors import UserError, out_of_memory
from ...packing.layout import build_batch
from ..checks import probe_groups
from ..policy import Policy
from ..sources import first_line
from .comparison import difference
from .compiled import compile_changes, compile_lack
from .exchange import Change, Exchange, Kernels
from .liger import liger_changes, liger_lack

CHANGES: dict[str, Callable[[Policy], list[Change]]] = {"liger": liger_changes, "compile": compile_changes}
"""What each kind changes in a model, in order of preference."""
DEVICES = ("cuda",)
"""Where ``auto`` takes any."""


def fuse_blocks(policy: Policy, requested: KernelName, *, share_prompts: bool = True) -> None:
    """Have a policy compute its blocks with the kernels that are asked for. Every rank must call it.

    They are compared with the model's own on a small pack, log-probs and, block by block, gradients. They change no
    number by more than another packing may, so they are no part of what a stored log-prob depends on.

    Args:
        policy: in the layout in which it will compute packs, and sharded if it is to be.
        requested: ``model.kernels``; ``auto`` takes the first kind that can be used, none of them on the CPU.
        share_prompts: whether packs hold a prompt once.

    Raises:
        UserError: kernels that were asked for by name cannot be used.
    """
    if requested == "none":
        return
    if requested != "auto":
        if obstacle := _try(policy, requested, share_prompts):
            raise UserError(f"model.kernels={requested} cannot be used here: {obstacle}; set model.kernels to auto")
        policy.kernels = Kernels(requested, "requested")
        return
    if policy.device.type not in DEVICES:
        policy.kernels = Kernels("none", f"none pays on {policy.device.type}")
        return
    passed_over: list[str] = []
    for name in CHANGES:
        obstacle = _try(policy, name, share_prompts)
        if obstacle is None:
            policy.kernels = Kernels(name, _passed(passed_over) or "first choice")
            return
        passed_over.append(f"{name}: {obstacle}")
    policy.kernels = Kernels("none", _passed(passed_over))


def use_kernels(policy: Policy, kernels: Kernels) -> None:
    """Have a policy compute its blocks with kernels that were compared in another one of the same kind."""
    policy.kernels = kernels
    if kernels.name != "none":
        policy.exchange = Exchange(CHANGES[kernels.name](policy))
        policy.exchange.on()


def auto_words(device_type: str) -> str:
    """What ``auto`` tries for a model on a kind of device, before there is one."""
    if device_type not in DEVICES:
        return f"none (none pays on {device_type})"
    lacks = {"liger": liger_lack(), "compile": compile_lack(device_type)}
    able = [name for name in CHANGES if not lacks[name]]
    reasons = _passed([f"{name}: {lack}" for name, lack in lacks.items() if lack]) or "first choice"
    return f"{', else '.join([*able, 'none'])} ({reasons}; compared on a small pack when a model is loaded)"


def kernels_words(policy: Policy) -> str:
    """What computes the blocks, and why."""
    name, reason = policy.kernels
    return f"{name} ({reason})" if reason else name


def _passed(reasons: list[str]) -> str:
    return f"passed over {'; '.join(reasons)}" if reasons else ""


def _try(policy: Policy, name: str, share_prompts: bool) -> str | None:
    """Use kernels and compare; why they cannot be used, or None."""
    groups = probe_groups(policy.config, seed=0)
    batch = build_batch(groups, share_prompts=share_prompts and not policy.layout.in_rows).to(policy.device)
    try:
        use_kernels(policy, Kernels(name))
        obstacle = difference(policy, policy.exchange, batch)
    except Exception as error:
        # a compiler raises what it will
        if distributed.lost_connection(error) or out_of_memory(error) is not None:
            raise
        obstacle = first_line(error)
    # the ranks run the same blocks or none
    obstacle = next((found for found in distributed.gather(obstacle) if found is not None), None)
    if obstacle is not None:
        policy.exchange.off()
        policy.exchange, policy.kernels = Exchange(), Kernels()
    return obstacle
