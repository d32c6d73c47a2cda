"""Optimizer, learning-rate schedule, and the guarded update that ends every optimizer step.

Names, defaults and the order of operations follow the Hugging Face Trainer, so that a run here and a run there see the
same learning rate at every step and decay the same parameters.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from .. import distributed, mesh
from ..config.schema import OptimConfig
from ..errors import UserError
from .held_weights import HeldWeights, holding, sum_in_float32
from .row_blocks import RowBlocks, by_rows, wide_parameters
from .schedules import SHARES

METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that move on the evaluation loss instead of on steps."""

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
_FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")
_SET_HERE = (
    *("self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"),
    *("step", "warmup", "total"),
)

log = logging.getLogger(__name__)


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: all but biases and the weights of norms."""
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    return {
        name
        for name, _ in model.named_parameters()
        if not _NO_DECAY.search(name.lower()) and not any(name.startswith(f"{norm}.") for norm in norms)
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Trainable parameters in two groups, decayed first, and their names in the order of the groups."""
    decayed = decayed_names(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with_decay = [(name, p) for name, p in trainable if name in decayed]
    without = [(name, p) for name, p in trainable if name not in decayed]
    groups = [
        {"params": [p for _, p in members], "weight_decay": decay}
        for members, decay in ((with_decay, weight_decay), (without, 0.0))
    ]
    return groups, [name for name, _ in (*with_decay, *without)]


def build_optimizer(model: nn.Module, config: OptimConfig, *, seed: int = 0) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer over the trainable parameters of ``model``, and their names in its order.

    Args:
        model: its trainable parameters have the dtype that ``config.master_weights`` asks for.
        seed: of stochastic rounding.

    Raises:
        UserError: no parameter is trainable, or bitsandbytes is not installed.
    """
    groups, names = parameter_groups(model, config.weight_decay)
    if not names:
        raise UserError("the model has no trainable parameter: check model.lora.target_modules")
    kind, options = _optimizer_kind(config, next(p for group in groups for p in group["params"]).device)
    if config.master_weights != "float32" or config.offload:
        kind = holding(kind)
    optimizer = kind(groups, lr=config.learning_rate, **options)
    if isinstance(optimizer, RowBlocks):
        optimizer.keep_wide(wide_parameters(model))
    if isinstance(optimizer, HeldWeights):
        compensated = config.master_weights == "kahan"
        optimizer.hold(names, seed, compensated=compensated, offload=config.offload)
    return optimizer, names


def _optimizer_kind(config: OptimConfig, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The class of an optimizer, and its options but for the learning rate."""
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop, {"alpha": config.rmsprop_alpha, "foreach": updates_at_once(config, device.type)}
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer not in _BITSANDBYTES:
        return torch.optim.AdamW, {**adam, "fused": device.type in _FUSED_DEVICES}
    check_optimizer(config.optimizer)
    import bitsandbytes

    return by_rows(getattr(bitsandbytes.optim, _BITSANDBYTES[config.optimizer])), adam


def updates_at_once(config: OptimConfig, kind: str) -> bool:
    """Whether an optimizer works on all weights together on a kind of device, in as much memory beside them."""
    return config.optimizer == "rmsprop" and kind == "cuda"


def check_optimizer(name: str) -> None:
    """Raise a ``UserError`` when the package of an optimizer is not there."""
    if name not in _BITSANDBYTES:
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"optim.optimizer={name} needs bitsandbytes: pip install dpo-kernels[qlora]") from error


def schedule_names() -> tuple[str, ...]:
    """All that ``optim.lr_scheduler_type`` may be."""
    from transformers.trainer_utils import SchedulerType

    return tuple(kind.value for kind in SchedulerType)


def check_schedule_name(name: str) -> None:
    """Raise a ``UserError`` with the nearest name when ``name`` is no schedule."""
    if name in SHARES or name in (names := schedule_names()):
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise UserError(
        f"optim.lr_scheduler_type: {name!r} is not a schedule; did you mean {near!r}? One of {', '.join(names)}"
    )


def check_schedule(config: OptimConfig, *, total_steps: int = 1000) -> None:
    """Try a schedule over a run of so many steps, without a model.

    Raises:
        UserError: an unknown name, options that the schedule lacks or does not know, or rates that are no numbers.
    """
    check_schedule_name(config.lr_scheduler_type)
    name, given = config.lr_scheduler_type, config.lr_scheduler_kwargs or {}
    known = _schedule_options(name)
    unknown = next((option for option in given if option not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        has = f"its options are {', '.join(known)}" if known else "it has none"
        raise UserError(f"optim.lr_scheduler_kwargs: {name} has no option {unknown!r}{meant} ({has})")
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = build_schedule(stand_in, config, total_steps=total_steps)
    if not isinstance(schedule, LambdaLR):
        return
    warmup = config.num_warmup_steps(total_steps)
    for step in sorted({0, min(warmup, total_steps - 1), total_steps // 2, total_steps - 1}):
        with _schedule_errors(name):
            rate = schedule.base_lrs[0] * schedule.lr_lambdas[0](step)
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"the learning rate of step {step + 1:,} of {total_steps:,} would be {rate:.4g}")


def warn_of_long_warmup(config: OptimConfig, *, total_steps: int) -> None:
    """Say that a warm-up does not end within the run."""
    warmup = config.num_warmup_steps(total_steps)
    if warmup >= total_steps and config.lr_scheduler_type not in ("constant", *METRIC_SCHEDULES):
        log.warning(
            "optim.warmup_steps is %d and the run has %d steps: the learning rate never reaches optim.learning_rate",
            *(warmup, total_steps),
        )


def _schedule_options(name: str) -> list[str]:
    """What ``optim.lr_scheduler_kwargs`` may name."""
    built_by: Any = SHARES.get(name)
    if built_by is None:
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
        from transformers.trainer_utils import SchedulerType

        classes: dict[str, Any] = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
        built_by = classes.get(name) or TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    return [option for option in inspect.signature(built_by).parameters if option not in _SET_HERE]


@contextmanager
def _schedule_errors(name: str) -> Iterator[None]:
    """What a schedule raises for options that do not fit, as a ``UserError``."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"optim.lr_scheduler_type {name!r} cannot be built: {error}; set its options in optim.lr_scheduler_kwargs"
        ) from error


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, *, total_steps: int
) -> LRScheduler | ReduceLROnPlateau:
    """The schedule of ``config`` over ``total_steps`` optimizer steps.

    Raises:
        UserError: an unknown name, or options that the schedule lacks or does not know.
    """
    name, options = config.lr_scheduler_type, dict(config.lr_scheduler_kwargs or {})
    check_schedule_name(name)
    warmup = config.num_warmup_steps(total_steps)
    with _schedule_errors(name):
        if name in SHARES:
            return LambdaLR(optimizer, partial(SHARES[name], warmup=warmup, total=total_steps, **options))
        from transformers import get_scheduler

        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=options,
        )


def change_total(schedule: LRScheduler | ReduceLROnPlateau, config: OptimConfig, *, before: int, total: int) -> str:
    """Set the learning rate to where a schedule is that was built for another number of steps than so far.

    From here on, every rate is the one of a run of ``total`` steps from its start.

    Args:
        schedule: with the state that it had in a run of ``before`` steps.

    Returns:
        What the learning rate does, in words.
    """
    what = f"the run goes on to step {total:,} instead of {before:,}"
    if not isinstance(schedule, LambdaLR):
        return f"{what}; {config.lr_scheduler_type} moves on the evaluation loss, whatever their number"
    groups = schedule.optimizer.param_groups
    old, done = float(groups[0]["lr"]), schedule.last_epoch
    rates = [base * rate(done) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = list(rates)
    if done >= total:
        return f"{what}, which is done"
    last = schedule.base_lrs[0] * schedule.lr_lambdas[0](total - 1)
    name = config.lr_scheduler_type
    if rates[0] == old:
        return f"{what}; the learning rate of step {done + 1:,} is {old:.4g} as before, of the last one {last:.4g}"
    return (
        f"{what}, and from here on {name} is the schedule of {total:,} steps: the learning rate of step {done + 1:,} "
        f"is {rates[0]:.4g} ({old:.4g} in {before:,} steps), of the last one {last:.4g}"
    )


def _total_norm(grads: list[Tensor]) -> Tensor:
    """float32, whatever the gradients are."""
    if all(grad.dtype == torch.float32 for grad in grads):
        return torch.nn.utils.get_total_norm(grads, foreach=True)
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


class GuardedUpdate:
    """Gradient norm, clipping, the check that everything is finite, the update, the schedule.

    A loss or gradient that is not finite never reaches the weights. On the CPU the check is immediate. On a CUDA device
    the fused optimizer takes the verdict as a tensor and skips the update, and so does every later step, so that
    ``ok()`` may be asked at the next logging interval without a synchronisation in every step. RMSprop and the
    optimizers of bitsandbytes take no such tensor: with them the host waits once a step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler | ReduceLROnPlateau,
        *,
        max_grad_norm: float,
    ):
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.fused = bool(optimizer.defaults.get("fused"))
        self.failed = torch.zeros((), device=self.params[0].device)
        self.passes = 1
        """Backward passes of the step in progress."""
        # hooks of tensors are no garbage that Python finds: by one that held it, an update would keep the model forever
        update = weakref.ref(self)
        sum_in_float32(self.params, passes=lambda: getattr(update(), "passes", 1))

    @property
    def deferred(self) -> bool:
        """Whether the verdict stays on the device until ``ok`` is asked."""
        return self.fused and self.failed.device.type == "cuda"

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def ok(self) -> bool:
        """Whether every loss and gradient so far was finite. Waits for the device."""
        return not bool(self.failed)

    def step(self, loss: Tensor) -> Tensor:
        """End one optimizer step and clear the gradients.

        Args:
            loss: scalar, detached: the loss of the step, the same on every rank.

        Returns:
            The global norm of the gradients before clipping, a scalar tensor.
        """
        grads = [distributed.local_tensor(p.grad) for p in self.params if p.grad is not None]
        norm = mesh.norm_over_shards(_total_norm(grads))
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self.failed = torch.maximum(self.failed, (~finite).float())
        if self.deferred or self.ok():
            self._update(grads, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _update(self, grads: Iterable[Tensor], norm: Tensor) -> None:
        if self.fused:
            # The fused kernel scales while it reads the gradients, which saves a pass over them.
            self.optimizer.found_inf = self.failed if self.deferred else None  # type: ignore[attr-defined]
            self.optimizer.grad_scale = self._inverse_clip(norm)  # type: ignore[attr-defined]
        elif isinstance(self.optimizer, HeldWeights):
            # In float32, as torch does it; gradients may be bfloat16.
            self.optimizer.clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm else None
        elif self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.max_grad_norm, norm)
        self.optimizer.step()
        if not self.moves_on_metric:
            self.schedule.step()  # type: ignore[call-arg]

    def _inverse_clip(self, norm: Tensor) -> Tensor | None:
        if not self.max_grad_norm:
            return None
        scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        if not self.deferred and scale == 1:
            return None
        return scale

    @property
    def moves_on_metric(self) -> bool:
        return not isinstance(self.schedule, LambdaLR)

    def evaluated(self, eval_loss: float) -> None:
        """Advance a schedule that moves on the evaluation loss."""
        if self.moves_on_metric:
            self.schedule.step(eval_loss)  # type: ignore[arg-type]
