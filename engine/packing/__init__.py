"""From preference groups to forward passes: which groups go together, and how a pack is laid out."""

from .layout import AttentionPlan, PackedBatch, Segment, build_batch
from .plan import Pack, Step, check_fits, group_costs, group_sizes, pack_groups, pack_lengths, plan_epoch
from .summary import PlanSummary, describe_plan, mixer_padding_words, plan_first_epoch, summarize_plan

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
