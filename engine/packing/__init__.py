"""From preference groups to forward passes: which groups go together, and how a pack is laid out.

Names are imported when they are asked for: tensors of packs bring torch, which reading data does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layout import AttentionPlan, PackedBatch, Segment, build_batch
    from .plan import Pack, Step, check_fits, group_costs, group_sizes, pack_groups, pack_lengths, plan_epoch
    from .summary import PlanSummary, describe_plan, mixer_padding_words, plan_first_epoch, summarize_plan

_PLACES = {
    "layout": ("AttentionPlan", "PackedBatch", "Segment", "build_batch"),
    "plan": (
        *("Pack", "Step", "check_fits", "group_costs"),
        *("group_sizes", "pack_groups", "pack_lengths", "plan_epoch"),
    ),
    "summary": ("PlanSummary", "describe_plan", "mixer_padding_words", "plan_first_epoch", "summarize_plan"),
}

__all__ = [
    "AttentionPlan",
    "Pack",
    "PackedBatch",
    "PlanSummary",
    "Segment",
    "Step",
    "build_batch",
    "check_fits",
    "describe_plan",
    "group_costs",
    "group_sizes",
    "mixer_padding_words",
    "pack_groups",
    "pack_lengths",
    "plan_epoch",
    "plan_first_epoch",
    "summarize_plan",
]


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
