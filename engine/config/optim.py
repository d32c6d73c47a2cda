"""The ``optim`` section of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .require import require as _require

SchedulerType = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "rmsprop"] = "adamw"
    """adamw is torch's, fused; 8bit (smaller state) and paged (state leaves a full device for host memory) need
    bitsandbytes, and run sharded, too; rmsprop is what the DPO paper used."""
    master_weights: Literal["float32", "stochastic", "kahan"] = "float32"
    """What trained weights are kept in: float32; or bfloat16, half of it, whose updates are made in float32 and rounded
    back: up or down at random from train.seed (stochastic), or with the 16 bits that rounding leaves kept (kahan)."""
    offload: bool = False
    """Keep the optimizer's state in host memory between updates; it takes time, and changes no number."""
    learning_rate: float = 1.0e-6
    """Peak learning rate."""
    lr_scheduler_type: SchedulerType = "linear"
    """Schedule, by its name in transformers."""
    lr_scheduler_kwargs: dict[str, int | float | str] | None = None
    """Further arguments of the schedule, such as min_lr_rate for cosine_with_min_lr."""
    warmup_steps: float = 0
    """Optimizer steps of linear warm-up; a number below 1 is a share of all steps."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 does not clip."""
    weight_decay: float = 0.0
    """Decoupled for adamw, added to the gradient for rmsprop."""
    adam_beta1: float = 0.9
    """Decay of the first moment of adamw."""
    adam_beta2: float = 0.999
    """Decay of the second moment of adamw."""
    adam_epsilon: float = 1.0e-8
    """Added to the denominator of adamw."""
    rmsprop_alpha: float = 0.99
    """Decay of the second moment of rmsprop."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optim.learning_rate must be positive, got {self.learning_rate}")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps must not be negative, got {self.warmup_steps}")
        _require(
            self.warmup_steps < 1 or float(self.warmup_steps).is_integer(),
            f"optim.warmup_steps must be a whole number of steps or a share below 1, got {self.warmup_steps}",
        )
        if float(self.warmup_steps).is_integer():
            object.__setattr__(self, "warmup_steps", int(self.warmup_steps))
        _require(
            not (self.offload and self.optimizer.startswith("paged")),
            f"optim.offload keeps state in host memory, and {self.optimizer} puts it there where the device is full: "
            f"set optim.offload to false, or optim.optimizer to {self.optimizer.removeprefix('paged_')}",
        )
        _require(self.max_grad_norm >= 0, f"optim.max_grad_norm must not be negative, got {self.max_grad_norm}")
        _require(self.weight_decay >= 0, f"optim.weight_decay must not be negative, got {self.weight_decay}")
        _require(self.adam_epsilon > 0, f"optim.adam_epsilon must be positive, got {self.adam_epsilon}")
        for name in ("adam_beta1", "adam_beta2", "rmsprop_alpha"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name} must be in [0, 1), got {value}")

    @property
    def weights_dtype(self) -> Literal["float32", "bfloat16"]:
        """What trained weights are held in."""
        return "float32" if self.master_weights == "float32" else "bfloat16"

    def num_warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of warm-up in a run of ``total_steps``; a share is rounded up, as transformers does."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(self.warmup_steps * total_steps)
