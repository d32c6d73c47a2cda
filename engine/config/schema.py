"""The run configuration: one frozen dataclass per YAML section, validated when it is built."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Literal

from .datasets import COLUMN_PARTS, DatasetConfig, RowFormat
from .lora import LoraConfig
from .losses import REFERENCE_FREE_LOSSES, LossConfig, check_unpaired
from .mixture import AMOUNTS, check_mixture, check_parts
from .optim import OptimConfig
from .require import require as _require
from .training import TrainConfig

Quantization = Literal["nf4", "fp4"]
LayoutName = Literal["auto", "shared", "rows"]
KernelName = Literal["auto", "liger", "compile", "none"]
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(?<!aux)")


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained and how it computes."""

    model_name_or_path: str
    """A folder with a transformers causal language model, or a model name on the Hub."""
    tokenizer_name_or_path: str | None = None
    """Defaults to the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; null is its main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; bfloat16 uses autocast. What trained parameters are held in is optim.master_weights."""
    attention: Literal["auto", "flash3", "flash", "varlen", "flex", "native", "sdpa"] = "auto"
    """Attention backend: flash3 (FlashAttention 3, Hopper), flash (the flash-attn package), varlen (torch, CUDA),
    flex (FlexAttention, compiled, CUDA), native (C++ of this package, CPU), sdpa (torch, anywhere)."""
    kernels: KernelName = "auto"
    """What fuses small operations of a block: liger (Liger-Kernel's layers, never its loss), compile (torch.compile,
    once for all lengths), none; auto is the first that can be used on CUDA, and none on a CPU."""
    lora: LoraConfig | None = None
    """Low-rank adapters; null trains all parameters."""
    adapter_name_or_path: str | None = None
    """A trained adapter to train further, with its own rank and scale; a frozen copy of it is the reference."""
    quantization: Quantization | None = None
    """Hold the frozen base of adapters in 4 bits, through bitsandbytes: QLoRA."""

    def __post_init__(self) -> None:
        _require(self.model_name_or_path != "", "model.model_name_or_path must not be empty")
        _require(self.adapter_name_or_path != "", "model.adapter_name_or_path must not be empty; leave it out for none")
        _require(
            self.lora is None or self.adapter_name_or_path is None,
            "model.adapter_name_or_path is trained with its own rank and scale: set model.lora to null; for a fresh "
            "adapter on top of it, first merge it into its base with `dpo merge`",
        )

    @property
    def trains_adapter(self) -> bool:
        """Whether adapters are trained, and the model's own weights frozen."""
        return self.lora is not None or self.adapter_name_or_path is not None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where preference rows come from and how they become tokens."""

    dataset_name: str | tuple[str, ...] | None = field(default=None, metadata={"needed_without": "datasets"})
    """A file (.json, .jsonl, .parquet, .csv, .tsv, each also .gz), a pattern such as data/*.jsonl, a list of those, a
    folder of files, or a dataset name on the Hub."""
    datasets: tuple[DatasetConfig, ...] = ()
    """A mixture of several sets instead of dataset_name: a list of {name, and one of weight, fraction or rows}, with
    further keys where sets differ (docs/data.md)."""
    dataset_config: str | None = None
    """Configuration of a Hub dataset, or of a folder whose README.md lists some."""
    dataset_train_split: str = "train"
    """Split that is trained on, possibly a slice such as train[:80%]; a single file has only the split train."""
    eval_dataset_name: str | dict[str, str] | None = None
    """As dataset_name, for evaluation; null is no evaluation. Several sets have names, such as {safety: a.jsonl, style:
    b.jsonl}, and metrics begin with eval_safety_ and eval_style_ then."""
    eval_dataset_split: str | dict[str, str] = "test"
    """Split of eval_dataset_name that is evaluated; of several sets, also by their names."""
    eval_fraction: float | None = None
    """Share of the prompts of dataset_name that is evaluated and not trained on; by content, the same in every run."""
    max_length: int | None = 1024
    """Most tokens of prompt and response; longer responses are cut, longer prompts drop the row. null is no limit."""
    truncation_mode: Literal["keep_start"] = "keep_start"
    """Which end of a sequence over max_length stays."""
    format: RowFormat = "auto"
    """Row layout; auto reads it off the column names. conversation reads text as user and assistant turns."""
    columns: dict[str, str | None] | None = None
    """Which column holds a part of the row, such as {prompt: ask, chosen: good, rejected: bad}; null says that a part,
    such as system, is not read."""
    mask_pattern: str | None = None
    """A regular expression: tokens of completions whose text it matches count nothing, for policy and reference."""
    turn_fields: dict[str, str] | None = None
    """Names of role and content in a message, where they are others than role/content or from/value."""
    roles: dict[str, str] | None = None
    """Further speakers of messages and the roles that they have, such as {customer: user}."""
    system: str | None = None
    """System text of every conversation that has none of its own."""
    remove_none_values: bool = True
    """Leave out keys without a value inside messages and tools, with which Parquet fills up."""
    lost_text: Literal["stop", "count"] = "stop"
    """What a row does whose text the chat template leaves out: a reasoning, a tool call, a turn."""
    scored_pairs: Literal["all", "best_vs_rest", "best_worst", "ranking"] = "all"
    """What scored completions stand for: pairs, which share one prompt, or (ranking) their order, for plackett_luce."""
    min_score_gap: float = 0.0
    """Pairs whose scores differ by less are left out, and so are ties."""
    chat_template: str = "auto"
    """auto (the tokenizer's, when it has one), none (plain text), or a path to a Jinja file."""
    template_date: str | None = None
    """The day, such as 2026-11-26, for a chat template that writes today's date; null is that of the run, of its
    reference store, or, at the first, today."""
    max_rows: int | None = None
    """Use only the first rows; null is all."""
    streaming: bool = False
    """Read the training data in windows while training, so that it is never whole in memory or on disk: sets of the
    Hub, local files, addresses such as https://. Needs train.max_steps; order is drawn within a window."""
    stream_window: int = 10_000
    """Rows of a window of a stream: what shuffling and packing see at once."""
    cache: str = "auto"
    """Where tokenised rows are kept for the next start: auto (those of large files, in the user's cache folder), none,
    or a folder."""
    strict: bool = False
    """Stop at the first kind of problem that lint would otherwise only count."""

    def __post_init__(self) -> None:
        check_mixture(self)
        _require(
            self.max_length is None or self.max_length > 1, f"data.max_length must be at least 2, got {self.max_length}"
        )
        _require(
            self.template_date is None or _is_day(self.template_date),
            f"data.template_date must be a day such as 2026-11-26, got {self.template_date}",
        )
        _require(
            self.eval_fraction is None or 0 < self.eval_fraction < 1,
            f"data.eval_fraction must be a share between 0 and 1, got {self.eval_fraction}",
        )
        _require(
            self.eval_fraction is None or self.eval_dataset_name is None,
            "data.eval_fraction splits data.dataset_name, so leave data.eval_dataset_name out",
        )
        self._check_pattern()
        self._check_stream()
        check_parts(self, COLUMN_PARTS, "data")
        self._check_evaluation()
        _require(self.min_score_gap >= 0, f"data.min_score_gap must not be negative, got {self.min_score_gap}")
        _require(self.max_rows is None or self.max_rows > 0, f"data.max_rows must be positive, got {self.max_rows}")

    def _check_pattern(self) -> None:
        if self.mask_pattern is None:
            return
        try:
            re.compile(self.mask_pattern)
        except re.error as error:
            _require(False, f"data.mask_pattern is no regular expression: {error}, got {self.mask_pattern!r}")

    def _check_stream(self) -> None:
        _require(self.stream_window > 0, f"data.stream_window must be positive, got {self.stream_window}")
        _require(
            not self.streaming or self.eval_fraction is None,
            "data.eval_fraction needs the whole set, which data.streaming never holds: set data.eval_dataset_name",
        )
        amounts = sorted({"fraction", "rows"} & {a for one in self.datasets for a in AMOUNTS if getattr(one, a)})
        _require(
            not (self.streaming and amounts),
            f"data.streaming draws sets by weight, since their sizes are not known; data.datasets has "
            f"{' and '.join(amounts)}",
        )

    def _check_evaluation(self) -> None:
        named, splits = self.eval_dataset_name, self.eval_dataset_split
        names = set(named) if isinstance(named, dict) else set()
        _require(named != {}, "data.eval_dataset_name must name a set, or be null")
        for name in sorted(names):
            _require(
                _SET_NAME.fullmatch(name) is not None,
                f"data.eval_dataset_name: {name!r} cannot be a part of the names of metrics: write letters, digits, "
                "hyphens, dots and underscores, and not aux at the end, as in aux_loss",
            )
        unknown = sorted(set(splits) - names) if isinstance(splits, dict) else []
        _require(not unknown, f"data.eval_dataset_split: {', '.join(unknown)} is no set of data.eval_dataset_name")

    @property
    def has_evaluation(self) -> bool:
        """Whether there is evaluation data."""
        own = any(one.eval_split is not None for one in self.datasets)
        return self.eval_dataset_name is not None or self.eval_fraction is not None or own

    @property
    def names(self) -> tuple[str, ...]:
        """What is trained on: file names, folders, names on the Hub."""
        if self.datasets:
            return tuple(dict.fromkeys(one.name for one in self.datasets))
        return (self.dataset_name,) if isinstance(self.dataset_name, str) else self.dataset_name or ()

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """What the sets of evaluation data are called: eval alone, or eval_NAME each. Their metrics begin so."""
        if isinstance(self.eval_dataset_name, dict):
            return tuple(f"eval_{name}" for name in self.eval_dataset_name)
        return ("eval",) if self.has_evaluation else ()

    def eval_source(self, split: str) -> tuple[str | None, str]:
        """Dataset and split of one of ``eval_splits``; no dataset where ``eval_dataset_name`` names none."""
        name, part = split.removeprefix("eval_"), self.eval_dataset_split
        dataset = self.eval_dataset_name
        if isinstance(dataset, dict):
            dataset = dataset.get(name)
        return dataset, part.get(name, "test") if isinstance(part, dict) else part


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How preference groups are laid out in forward passes. It never changes the mathematics."""

    pairs_per_step: int = 64
    """Preference pairs per optimizer step, over all of its packs."""
    tokens_per_pack: int = 16384
    """Most tokens in one forward pass: the knob for memory."""
    share_prompts: bool = True
    """Compute the prompt once for all its responses."""
    layout: LayoutName = "auto"
    """auto takes the first that is exact for the model, which is tried at the start: packs, packs in which modules that
    mix tokens outside attention get rows, padded rows. shared is one of the first two, rows the last."""
    shuffle: bool = True
    """Draw a new order every epoch, from train.seed; false keeps the order of the file."""

    def __post_init__(self) -> None:
        _require(self.pairs_per_step > 0, f"packing.pairs_per_step must be positive, got {self.pairs_per_step}")
        _require(self.tokens_per_pack > 0, f"packing.tokens_per_pack must be positive, got {self.tokens_per_pack}")


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
    sync_ref_model: bool = False
    """Move the reference towards the policy while training (TR-DPO): a live second model, so not with adapters."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in the new reference, where it is moved."""
    ref_model_sync_steps: int = 512
    """Optimizer steps between two moves of the reference."""

    def __post_init__(self) -> None:
        alpha, steps = self.ref_model_mixup_alpha, self.ref_model_sync_steps
        _require(0 < alpha <= 1, f"reference.ref_model_mixup_alpha must be in (0, 1], got {alpha}")
        _require(steps > 0, f"reference.ref_model_sync_steps must be positive, got {steps}")
        _require(
            not self.sync_ref_model or self.mode in ("auto", "live"),
            f"reference.sync_ref_model moves the reference, so it cannot be {self.mode}: set reference.mode to live",
        )


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

    @property
    def packs(self) -> PackingConfig:
        """``packing`` of the packs that processes work on together."""
        return replace(self.packing, tokens_per_pack=self.train.context_parallel * self.packing.tokens_per_pack)

    def __post_init__(self) -> None:
        _require(
            self.reference.mode != "none" or REFERENCE_FREE_LOSSES.issuperset(self.loss.loss_types),
            f"reference.mode none does not fit loss.loss_type {self.loss.loss_name}, which compares with a reference",
        )
        check_unpaired(self.loss, self.packing.pairs_per_step, streaming=self.data.streaming)
        moves = self.reference.sync_ref_model
        _require(
            not (moves and self.model.trains_adapter),
            "reference.sync_ref_model needs a second model, and with adapters the reference is the model with them "
            "off: set reference.sync_ref_model to false, or train without adapters",
        )
        _require(
            not (moves and REFERENCE_FREE_LOSSES.issuperset(self.loss.loss_types)),
            f"reference.sync_ref_model has no meaning for loss.loss_type {self.loss.loss_name}, which has no reference",
        )
        held = f"optim.master_weights {self.optim.master_weights} holds weights in bfloat16"
        _require(
            self.optim.weights_dtype == "float32" or self.model.dtype == "bfloat16",
            f"{held}, and model.dtype is {self.model.dtype}: set one of them to the other's dtype",
        )
        _require(
            self.optim.weights_dtype == "float32" or not moves,
            f"{held}, and reference.sync_ref_model would move a reference by less than that can hold: set "
            "optim.master_weights to float32, or reference.sync_ref_model to false",
        )
        _require(
            self.train.eval_steps is None or self.data.has_evaluation,
            "train.eval_steps needs data.eval_dataset_name or data.eval_fraction",
        )
        _require(
            not (isinstance(self.data.eval_dataset_name, dict) and self.train.compares and not self.train.best_metric),
            "data.eval_dataset_name has several sets: name the metric of one in train.metric_for_best_model, such as "
            f"{(*self.data.eval_splits, 'eval')[0]}_loss",
        )
        _require(
            self.model.quantization is None or self.model.trains_adapter,
            "model.quantization freezes the model: set a key of model.lora, or model.adapter_name_or_path",
        )
