"""What a plan costs, from lengths alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..config.schema import PackingConfig, RunConfig
from ..data.groups import PreferenceDataset
from ..data.lengths import GroupLengths
from .plan import Step, check_fits, group_sizes, plan_epoch
from .rows import Blocks, count_cells

PADDED_BATCH_PAIRS = 8
"""Pairs in the padded batch that packing is compared with: TRL's default per-device batch."""


@dataclass(frozen=True)
class PlanSummary:
    """Figures of one epoch."""

    groups: int
    responses: int
    steps_per_epoch: int
    total_steps: int
    packs: int
    packed_tokens: int
    computed_tokens: int
    """With the padding of rows; packs have none."""
    completion_tokens: int
    unshared_tokens: int
    padded_tokens: int
    capacity_tokens: int
    mixer_tokens: int = 0
    """That modules in rows compute: a prompt counts once for each of its responses."""
    mixer_cells: int = 0
    """The same with the padding of these rows."""

    @property
    def mixer_padding(self) -> float:
        """Share of what modules in rows compute that is padding."""
        return 1 - self.mixer_tokens / max(self.mixer_cells, 1)

    @property
    def fill(self) -> float:
        """Share of the token budget that the packs use. The rest is room, not padding: it is never computed."""
        return self.computed_tokens / self.capacity_tokens

    @property
    def padding(self) -> float:
        """Share of the computed tokens that is padding."""
        return 1 - self.packed_tokens / self.computed_tokens

    @property
    def saved_by_sharing(self) -> float:
        """Share of the unshared tokens that need not be computed."""
        return 1 - self.packed_tokens / self.unshared_tokens

    @property
    def padding_avoided(self) -> float:
        """Share of the padded batches that is padding."""
        return 1 - self.unshared_tokens / self.padded_tokens

    @property
    def padded_ratio(self) -> float:
        """Tokens of padded batches for one token of these packs."""
        return self.padded_tokens / self.packed_tokens


def padded_tokens(lengths: GroupLengths, batch_pairs: int = PADDED_BATCH_PAIRS) -> int:
    """Tokens of padded batches in source order: every response of a batch with its prompt, padded to the longest."""
    starts = np.arange(0, len(lengths), batch_pairs)
    longest = np.maximum.reduceat(lengths.prompts + lengths.longest, starts)
    return int((longest * np.add.reduceat(lengths.responses, starts)).sum())


def row_tokens(lengths: GroupLengths, steps: list[Step]) -> int:
    """Tokens of all packs as rows, each padded to the longest row of its pack."""
    widths, rows = lengths.prompts + lengths.longest, lengths.responses
    packs = [np.array(pack) for step in steps for pack in step]
    return int(sum(widths[pack].max() * rows[pack].sum() for pack in packs))


def mixer_cells(lengths: GroupLengths, steps: list[Step], blocks: Blocks) -> int:
    """What modules in rows compute of all packs, padding included."""
    rows_G = [parts[0] + parts[1:] for parts in lengths]
    return sum(count_cells(np.concatenate([rows_G[i] for i in pack]), blocks) for step in steps for pack in step)


def plan_first_epoch(dataset: PreferenceDataset, config: RunConfig) -> list[Step]:
    """The steps of the first epoch in one process.

    Raises:
        UserError: a group does not fit in a pack, or there is none.
    """
    packing, train = config.packs, config.train
    check_fits(
        dataset,
        tokens_per_pack=packing.tokens_per_pack,
        share_prompts=packing.share_prompts,
        in_rows=packing.layout == "rows",
        processes=train.context_parallel,
    )
    return plan_epoch(dataset.lengths, packing, seed=train.seed, members=dataset.epoch(train.seed, 0))


def summarize_plan(
    dataset: PreferenceDataset, config: RunConfig, steps: list[Step] | None = None, *, mixers: Blocks | None = None
) -> PlanSummary:
    """Plan the first epoch of ``config`` over ``dataset``, unless its ``steps`` are given, and count.

    Args:
        mixers: how the rows of modules stand that get some; None where no module does.

    Raises:
        UserError: a group does not fit in a pack, or there is none.
    """
    packing, train, lengths = config.packs, config.train, dataset.lengths
    if steps is None:
        steps = plan_first_epoch(dataset, config)
    if dataset.mixture is not None:
        lengths = lengths.take(dataset.epoch(train.seed, 0))
    packs = sum(len(step) for step in steps)
    per_epoch = math.ceil(dataset.per_epoch / packing.pairs_per_step)
    total = train.max_steps if train.max_steps > 0 else math.ceil(per_epoch * train.num_train_epochs)
    in_rows = packing.layout == "rows"
    packed = int(group_sizes(lengths, share_prompts=packing.share_prompts and not in_rows).sum())
    unshared = int(group_sizes(lengths, share_prompts=False).sum())
    return PlanSummary(
        groups=len(lengths),
        responses=int(lengths.responses.sum()),
        steps_per_epoch=len(steps),
        total_steps=total,
        packs=packs,
        packed_tokens=packed,
        computed_tokens=row_tokens(dataset.lengths, steps) if in_rows else packed,
        completion_tokens=int(lengths.completions.sum()),
        unshared_tokens=unshared,
        padded_tokens=padded_tokens(lengths),
        capacity_tokens=packs * packing.tokens_per_pack,
        mixer_tokens=unshared if mixers else 0,
        mixer_cells=mixer_cells(dataset.lengths, steps, mixers) if mixers else 0,
    )


def mixer_padding_words(s: PlanSummary) -> str:
    """How much of what modules in rows compute is padding."""
    return f"of the {s.mixer_cells:,} tokens an epoch that mixers compute in rows"


def describe_plan(s: PlanSummary, packing: PackingConfig, *, part: str = "epoch") -> list[tuple[str, str, str]]:
    """What ``dpo plan`` says of lengths: name, figure and note of each line.

    Args:
        part: what is planned at once.
    """
    in_rows = packing.layout == "rows"
    basis = f"a prompt counts once {'a row' if packing.share_prompts and not in_rows else 'a response'}"
    used = f"packs fill {s.fill:.1%} of tokens_per_pack; the rest is never computed"
    return [
        ("preference groups", f"{s.groups:,}", f"{s.responses:,} responses"),
        (
            "optimizer steps",
            f"{s.total_steps:,}",
            f"{s.steps_per_epoch:,} per {part}, {packing.pairs_per_step} groups each",
        ),
        (f"packs per {part}", f"{s.packs:,}", f"{s.packs / s.steps_per_epoch:.2f} per step"),
        (f"tokens per {part}", f"{s.packed_tokens:,}", f"{s.completion_tokens:,} of them reach the head; {basis}"),
        ("padding", f"{s.padding:.1%}", used),
        *([("mixer padding", f"{s.mixer_padding:.1%}", mixer_padding_words(s))] if s.mixer_cells else []),
        ("saved by sharing prompts", f"{s.saved_by_sharing:.1%}", f"of {s.unshared_tokens:,} tokens without sharing"),
        (
            f"padded batches of {PADDED_BATCH_PAIRS}",
            f"{s.padded_tokens:,}",
            f"{s.padded_ratio:.2f}x the tokens; {s.padding_avoided:.1%} of them padding",
        ),
    ]
