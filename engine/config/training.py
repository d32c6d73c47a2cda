"""The ``train`` section of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .require import require as _require

_PARTS = 1_000_000
"""What shares of all steps are counted in, to compare them."""

Recomputed = bool | Literal["selective"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run."""

    output_dir: str = "runs/default"
    """Folder of the run: metrics, checkpoints, the final model, the report. It must not hold another run."""
    num_train_epochs: float = 1
    """Passes over the data; may be a fraction."""
    max_steps: int = -1
    """Optimizer steps; when positive it replaces num_train_epochs."""
    seed: int = 42
    """Seed of the data order and of dropout in adapters."""
    save_steps: float | None = 500
    """Optimizer steps between checkpoints, the last of which follows the last step; null saves none. A number below 1
    is a share of all steps, here and in the next two."""
    save_total_limit: int | None = None
    """Keep only the newest checkpoints; null keeps all."""
    async_save: bool | None = None
    """Write checkpoints beside the steps that follow, from a copy of the state in host memory; null does so on a GPU
    where the copy fits."""
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the final model is stored in: auto is what was trained (float32, or bfloat16 by optim.master_weights), and
    loses nothing; bfloat16 halves the files and rounds small updates away, and what that costs is measured."""
    save_rounding: Literal["nearest", "stochastic"] = "nearest"
    """How weights become bfloat16; stochastic, up or down at random from train.seed, keeps the sum of small updates."""
    logging_steps: float = 10
    """Optimizer steps between lines of metrics.jsonl."""
    token_metrics: bool = True
    """Log logits/chosen, logits/rejected, entropy and mean_token_accuracy as TRL does: no product beside the loss's."""
    eval_steps: float | None = None
    """Optimizer steps between evaluations; null evaluates once, after training."""
    sample_steps: float | None = None
    """Optimizer steps between answers that the model gives to held-out prompts, besides those before and after
    training; null draws none. Below 1 a share of all steps."""
    sample_prompts: int = 8
    """How many prompts are answered, here and by dpo evaluate --samples: the first ones that differ."""
    sample_max_new_tokens: int = 128
    """Where their answers are cut, in tokens."""
    sample_temperature: float = 1.0
    """Of the second answer to each prompt; the first is the most likely one."""
    gradient_checkpointing: Recomputed = False
    """Recompute activations in the backward pass: true, all but each block's input, about a fifth slower; selective,
    all but what products and attention gave, at little cost for models of 8B, and on a GPU a large one for small ones,
    whose steps wait for the host, unless their blocks are compiled."""
    activation_offload: bool = False
    """Keep activations in host memory until the backward pass; gradient_checkpointing leaves few to move."""
    shards_per_replica: int | None = None
    """Of several processes, how many hold one copy of the model between them: null is all of them, or one where the
    model is quantised; with 1 each holds it whole and gradients are added up once a step."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What shards are gathered and computed in: bfloat16 needs two thirds of the traffic, and other numbers come out
    than in one process."""
    context_parallel: int = 1
    """So many processes work on each pack together, which may have as many times packing.tokens_per_pack: each has a
    part of the tokens, and in attention a part of the heads."""
    timeout_minutes: float = 60
    """How long one of several processes waits for another, such as for the first one to read a model or write one."""
    early_stopping_patience: int | None = None
    """End the run after so many evaluations in a row that are not better than the best; null never does."""
    early_stopping_threshold: float = 0.0
    """By how much an evaluation must be better to count, for early_stopping_patience."""
    load_best_model_at_end: bool = False
    """Write the model of the checkpoint with the best evaluation, which every checkpoint has then and
    save_total_limit spares; false writes the last one."""
    metric_for_best_model: str | None = None
    """What evaluations are compared by, such as loss or rewards/accuracies, with or without eval_; null is loss."""
    greater_is_better: bool | None = None
    """Whether a larger value of it is better; null is true but for names that end in loss."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab", "none"], ...] = ("tensorboard",)
    """Trackers beside metrics.jsonl, which is always written; none or [] is no other. Each reads its environment
    variables."""
    run_name: str | None = None
    """What the run is called there; null is the name of output_dir."""
    project: str | None = None
    """Project (for mlflow, the experiment) that it is put into there; null is dpo-kernels."""

    def __post_init__(self) -> None:
        _require(self.output_dir != "", "train.output_dir must not be empty")
        if self.report_to == ("none",):
            # one spelling for no tracker
            object.__setattr__(self, "report_to", ())
        _require("none" not in self.report_to, "train.report_to none stands alone: leave it or the others out")
        for name in ("save_steps", "logging_steps", "eval_steps", "sample_steps"):
            steps = getattr(self, name)
            _require(
                steps is None or 0 < steps < 1 or (steps >= 1 and float(steps).is_integer()),
                f"train.{name} must be a positive whole number of steps or a share below 1, got {steps}",
            )
            if steps is not None and steps >= 1:
                # Read as a number with a fraction, and shown without one.
                object.__setattr__(self, name, int(steps))
        _require(self.num_train_epochs > 0, f"train.num_train_epochs must be positive, got {self.num_train_epochs}")
        _require(
            self.max_steps == -1 or self.max_steps > 0,
            f"train.max_steps must be positive, or -1 for no limit, got {self.max_steps}",
        )
        _require(self.timeout_minutes > 0, f"train.timeout_minutes must be positive, got {self.timeout_minutes}")
        shards = self.shards_per_replica
        _require(
            shards is None or shards > 0, f"train.shards_per_replica must be positive, or null for all, got {shards}"
        )
        _require(self.context_parallel > 0, f"train.context_parallel must be positive, got {self.context_parallel}")
        _require(0 <= self.seed < 2**32, f"train.seed must be in [0, 2**32), got {self.seed}")
        limit = self.save_total_limit
        _require(limit is None or limit > 0, f"train.save_total_limit must be positive or null, got {limit}")
        for name in ("sample_prompts", "sample_max_new_tokens", "sample_temperature"):
            _require(getattr(self, name) > 0, f"train.{name} must be positive, got {getattr(self, name)}")
        self._check_best()

    def _check_best(self) -> None:
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        _require(
            patience is None or patience > 0, f"train.early_stopping_patience must be positive or null, got {patience}"
        )
        _require(threshold >= 0, f"train.early_stopping_threshold must not be negative, got {threshold}")
        _require(self.metric_for_best_model != "", "train.metric_for_best_model must not be empty; null is loss")
        for key, on in (
            ("early_stopping_patience", patience is not None),
            ("load_best_model_at_end", self.load_best_model_at_end),
        ):
            _require(not on or self.eval_steps is not None, f"train.{key} compares evaluations: set train.eval_steps")
        if self.load_best_model_at_end:
            _require(
                self.save_steps is not None,
                "train.load_best_model_at_end goes back to a checkpoint: set train.save_steps, to train.eval_steps or "
                "a multiple of it",
            )
            assert self.save_steps is not None
            assert self.eval_steps is not None
            _require(
                (self.save_steps < 1) == (self.eval_steps < 1)
                # A share is not stored exactly: 0.3 is three times 0.1.
                and round(self.save_steps * _PARTS) % max(round(self.eval_steps * _PARTS), 1) == 0,
                f"train.load_best_model_at_end evaluates every checkpoint: train.save_steps must be a multiple of "
                f"train.eval_steps, got {self.save_steps:g} and {self.eval_steps:g}",
            )

    @property
    def compares(self) -> bool:
        """Whether evaluations are compared with each other."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def best_metric(self) -> str | None:
        """``metric_for_best_model`` as evaluations name it; None where it is left to be the loss."""
        name = self.metric_for_best_model
        return None if name is None else name if name.startswith(("eval_", "eval/")) else f"eval_{name}"

    def every(self, key: str, total_steps: int) -> int | None:
        """Optimizer steps between two of what ``key`` counts, in a run of ``total_steps``; None for never.

        A share is rounded up, as transformers does.
        """
        steps = getattr(self, key)
        return None if steps is None else math.ceil(steps * total_steps) if steps < 1 else int(steps)
