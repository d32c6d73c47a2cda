"""One set of preference rows: the names of layouts and of parts of a row, and the keys of a set of a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .mixture import check_parts, check_set

RowFormat = Literal[
    "auto", "preference", "conversation", "hh", "sharegpt", "kwise", "scored", "tokenized", "unpaired", "alpaca",
    "question", "messages", "chosen_response", "llama_factory", "ms_swift", "openai", "nemo_rl", "torchtune",
    "stack_exchange", "nectar", "shp", "pku_saferlhf", "helpsteer2", "helpsteer3", "step_dpo", "arena", "input_ids",
    "labelled", "kto_tag",
]  # fmt: skip
COLUMN_PARTS = (
    "prompt", "chosen", "rejected", "system", "input", "history", "tools", "messages", "responses", "ranking",
    "scores", "completion", "label", "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps",
    "ref_rejected_logps", "ref_logps", "chat_template_kwargs", "weight", "margin", "mask", "weights", "chosen_mask",
    "rejected_mask", "chosen_weights", "rejected_weights",
)  # fmt: skip
"""Parts of a row that ``data.columns`` may name a column for."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One set of a mixture: its own files and layout, and how much of it an epoch takes."""

    name: str
    """As data.dataset_name: a file, a pattern, a folder, or a name on the Hub."""
    config: str | None = None
    """As data.dataset_config."""
    split: str = "train"
    """As data.dataset_train_split."""
    eval_split: str | None = None
    """Split of the set that is evaluated, whole; null is none."""
    data_files: tuple[str, ...] = ()
    """Files or patterns below the folder, or in the Hub dataset, that are read instead of all of the split."""
    label: str | None = None
    """What metrics and messages call the set; null is the end of its name."""
    weight: float | None = None
    """Share of an epoch, relative to the other sets; the epoch has as many rows as all sets together."""
    fraction: float | None = None
    """Share of the set that an epoch takes; above 1, rows come more than once."""
    rows: int | None = None
    """Rows that an epoch takes; more than the set has come more than once."""
    format: RowFormat | None = None
    """As data.format; null is that one, here and below."""
    columns: dict[str, str | None] | None = None
    """As data.columns."""
    turn_fields: dict[str, str] | None = None
    """As data.turn_fields."""
    roles: dict[str, str] | None = None
    """As data.roles."""
    system: str | None = None
    """As data.system."""

    def __post_init__(self) -> None:
        check_set(self)
        check_parts(self, COLUMN_PARTS, "data.datasets")
