"""The run configuration: one frozen dataclass per YAML section, validated when it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, in the terms of peft."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        _require(self.r > 0, f"model.lora.r must be positive, got {self.r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained and how it computes."""

    model_name_or_path: str
    tokenizer_name_or_path: str | None = None
    """Defaults to the model's own."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype. Trained parameters and optimizer state are float32 in both cases; bfloat16 uses autocast."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    lora: LoraConfig | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where preference rows come from and how they become tokens."""

    dataset_name: str
    """A file (.json, .jsonl, .parquet, each also .gz), a folder of them, or a dataset name on the Hub."""
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    eval_dataset_name: str | None = None
    eval_dataset_split: str = "test"
    max_length: int | None = 1024
    truncation_mode: Literal["keep_start"] = "keep_start"
    format: Literal["auto", "preference", "hh", "sharegpt", "tokenized"] = "auto"
    chat_template: str = "auto"
    """``auto`` (the tokenizer's, when it has one), ``none`` (plain text), or a path to a Jinja file."""
    max_rows: int | None = None
    strict: bool = False
    """Stop at the first kind of problem that lint would otherwise only count."""

    def __post_init__(self) -> None:
        _require(
            self.max_length is None or self.max_length > 1, f"data.max_length must be at least 2, got {self.max_length}"
        )
        _require(self.max_rows is None or self.max_rows > 0, f"data.max_rows must be positive, got {self.max_rows}")


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How preference groups are laid out in forward passes. It never changes the mathematics."""

    pairs_per_step: int = 64
    """Preference pairs per optimizer step, over all packs, accumulation steps and ranks."""
    tokens_per_pack: int = 16384
    share_prompts: bool = True
    shuffle: bool = True

    def __post_init__(self) -> None:
        _require(self.pairs_per_step > 0, f"packing.pairs_per_step must be positive, got {self.pairs_per_step}")
        _require(self.tokens_per_pack > 0, f"packing.tokens_per_pack must be positive, got {self.tokens_per_pack}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The preference loss. Names as in TRL; see ``dpo_kernels.losses`` for every type and its source."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0

    def __post_init__(self) -> None:
        _require(self.beta > 0, f"loss.beta must be positive, got {self.beta}")
        _require(0 <= self.label_smoothing < 0.5, f"loss.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    learning_rate: float = 1.0e-6
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1.0e-8
    rmsprop_alpha: float = 0.99

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optim.learning_rate must be positive, got {self.learning_rate}")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps must not be negative, got {self.warmup_steps}")
        _require(self.max_grad_norm >= 0, f"optim.max_grad_norm must not be negative, got {self.max_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Where reference log-probs come from."""

    store: str | None = None
    """Folder of the store; defaults to one below the user's cache folder."""
    mode: Literal["auto", "stored", "live", "none"] = "auto"
    """``auto`` computes what the store lacks before training; ``stored`` stops when a row is missing; ``live`` runs the
    reference model beside the policy; ``none`` is for losses without a reference."""
    model_name_or_path: str | None = None
    """Defaults to the model that is trained, as it is before step 1."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run."""

    output_dir: str = "runs/default"
    num_train_epochs: float = 1
    max_steps: int = -1
    seed: int = 42
    save_steps: int = 500
    save_total_limit: int | None = None
    logging_steps: int = 10
    eval_steps: int | None = None
    gradient_checkpointing: bool = False
    report_to: tuple[Literal["tensorboard"], ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        _require(self.logging_steps > 0, f"train.logging_steps must be positive, got {self.logging_steps}")
        _require(self.save_steps > 0, f"train.save_steps must be positive, got {self.save_steps}")
        _require(self.num_train_epochs > 0, f"train.num_train_epochs must be positive, got {self.num_train_epochs}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: what ``dpo train run.yaml`` reads."""

    model: ModelConfig
    data: DataConfig
    packing: PackingConfig = field(default_factory=PackingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
