"""Start-up check of training: does a backward pass run here? Kernels may give log-probs and refuse their gradients."""

from __future__ import annotations

import traceback
from importlib.metadata import packages_distributions
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .. import distributed
from ..errors import BackendError, UserError, out_of_memory
from ..packing.layout import PackedBatch
from .attention import choice
from .checks import ADVICE, place_words, probe_batch
from .diagnosis import innermost_module
from .mixers import class_name
from .policy import Policy
from .sources import first_line

_COMMON = ("torch", "triton", "transformers", "peft", "dpo_kernels", __name__.partition(".")[0])
"""Packages that a run does not do without."""


def check_backward(policy: Policy, *, share_prompts: bool = True, seed: int = 0) -> None:
    """Take the gradient of a small pack's log-probs once, in the way that training will, and keep nothing of it.

    Whole packs on the CPU need no such trial: nothing but torch's own operators and ours runs there. Nor are sharded
    weights gathered for it outside a step.

    Args:
        policy: in the layout in which it will compute packs.
        share_prompts: whether packs hold a prompt once.

    Raises:
        UserError: something in the backward pass, or in the forward pass of training, refuses.
        BackendError: attention does.
    """
    plain = policy.layout.kind == "shared" and policy.device.type not in choice.KERNEL_DEVICES
    if policy.sharded or plain:
        return
    batch = probe_batch(policy, share_prompts, seed)
    try:
        _take_gradient(policy, batch)
    except UserError:
        raise
    except Exception as error:
        # kernels and compilers raise what they will
        if distributed.lost_connection(error) or out_of_memory(error) is not None:
            raise
        raise _refusal(policy, batch, error) from error


def _take_gradient(policy: Policy, batch: PackedBatch) -> None:
    """That of the sum of log-probs by what the embeddings give, so that the gradient of no weight is kept."""
    embedded: list[torch.Tensor] = []

    def begin(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        # a model may change it in place
        return embedded[-1].clone()

    training = policy.training
    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(begin)  # type: ignore[operator]
    devices = [policy.device] if policy.device.type == "cuda" else []
    try:
        # adapters draw their dropout
        with torch.enable_grad(), torch.random.fork_rng(devices):
            logps = policy.train().logps(batch)
            if embedded and logps.requires_grad:
                torch.autograd.grad(logps.sum(), embedded, allow_unused=True)
        if policy.device.type == "cuda":
            # what fails on the device is known only then
            torch.cuda.synchronize(policy.device)
    finally:
        handle.remove()
        policy.train(training)


def _refusal(policy: Policy, batch: PackedBatch, error: Exception) -> UserError:
    """What refuses, why, and what to do."""
    module, place = innermost_module(error), "{}"
    if module is None:
        module, place = _module_in_backward(policy, batch), "the backward pass of {}"
    name = "the model" if module is None else class_name(module)
    reason = f"{type(error).__name__}: {first_line(error)}"
    if name in batch.plan.readers:
        return BackendError(
            f"attention backend {policy.backend.name} fails in {place.format(name)}: {reason}; "
            f"set model.attention to another of {', '.join(choice.NAMES)}, and see `dpo doctor`"
        )
    package = _package(error)
    advice = ADVICE
    if package is not None:
        advice = f"do what it asks for, or uninstall {package} where transformers does without it"
    words = f"{type(policy.causal_lm).__name__} cannot train {place_words(policy)}"
    return UserError(f"{words}: {place.format(name)} raises {reason}; {advice}")


def _module_in_backward(policy: Policy, batch: PackedBatch) -> nn.Module | None:
    """The innermost module whose backward pass has begun, and is not done, when the same fails once more."""
    names = {module: name for name, module in policy.causal_lm.named_modules() if name}
    inside: dict[nn.Module, None] = {}

    def numbers(values: Any) -> list[torch.Tensor]:
        return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.requires_grad]

    def mark(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        inputs = numbers((args, kwargs))
        for x in inputs:
            x.register_hook(lambda _: inside.pop(module, None))
        for x in numbers(list(output.values()) if isinstance(output, dict) else output):
            if not any(x is given for given in inputs):
                x.register_hook(lambda _: inside.setdefault(module))

    handles = [module.register_forward_hook(mark, with_kwargs=True) for module in names]
    try:
        _take_gradient(policy, batch)
    except Exception as error:
        # as the first time
        if distributed.lost_connection(error) or out_of_memory(error) is not None:
            raise
    finally:
        for handle in handles:
            handle.remove()
    return max(inside, key=lambda module: names[module].count("."), default=None)


def _package(error: BaseException) -> str | None:
    """The installed package, beyond those that every run has, whose code raised; None where it is none."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [name.partition(".")[0] for name in reversed(frames)]
    other = next((name for name in modules if name not in _COMMON), None)
    return None if other is None else next(iter(packages_distributions().get(other, ())), None)
