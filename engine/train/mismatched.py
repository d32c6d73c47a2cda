"""The groups of a split as the loss takes them: for KTO, rows with the completion of another one.

The divergence that KTO measures rewards from is estimated from completions under prompts that they do not belong to. By
TRL's custom these are the completions of a step, each under the prompt of the next row. Which rows share a step is
known before the first one, so each row is given its completion here, once: it is laid out, stored and looked up as
any response. Where later epochs shuffle rows into other steps, rows keep the completion of the first.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import numpy as np

from ..config.schema import RunConfig
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..errors import UserError
from ..packing.plan import epoch_order
from .feed import drawn_groups
from .terms import LossTerms


def loss_groups(config: RunConfig, dataset: PreferenceDataset, *, split: str) -> PreferenceDataset:
    """The groups of a split that the run of ``config`` takes, as its loss takes them.

    Args:
        dataset: read with ``unpair`` where the loss is one of unpaired rows.
        split: those of ``train`` are in steps, those of another one are evaluated at once.

    Raises:
        UserError: groups that a loss of unpaired rows does not take.
    """
    if config.loss.unpaired:
        LossTerms(config.loss).check_dataset(dataset)
    if "kto" in config.loss.loss_types:
        order, block = np.arange(len(dataset)), len(dataset)
        if split == "train":
            first = epoch_order(dataset.epoch(config.train.seed, 0), config.packing, seed=config.train.seed, epoch=0)
            block = config.packing.pairs_per_step
            order = step_order(first, len(dataset), block)
        dataset = with_mismatched(dataset, order, block, config.data.max_length)
    return drawn_groups(config, dataset) if split == "train" else dataset


def step_order(first: np.ndarray, groups: int, block: int) -> np.ndarray:
    """int64: the groups of the first epoch in its order, which a mixture may repeat, its last step filled up with the
    last group, and behind them those that it does not take."""
    steps = np.pad(first, (0, -len(first) % block), mode="edge")
    return np.concatenate([steps, np.setdiff1d(np.arange(groups), first)])


def with_mismatched(
    dataset: PreferenceDataset, order: np.ndarray, block: int, max_length: int | None
) -> PreferenceDataset:
    """``dataset`` with a second response in each group: that of the group before it in its block of ``order``, or of
    the last one for the first, cut to what ``max_length`` leaves it behind this prompt.

    Args:
        dataset: unpaired rows of one response.
        order: int64, every place in it; one that comes again keeps what it was given first.
        block: groups whose completions are exchanged.

    Raises:
        UserError: rows with reference log-probs of their own, which there are none of for the second response.
    """
    before = np.full(len(dataset), -1, np.int64)
    for start in range(0, len(order), block):
        step = np.array(list(dict.fromkeys(order[start : start + block].tolist())), np.int64)
        new = before[step] < 0
        before[step[new]] = np.roll(step, 1)[new]

    def mismatched(place: int) -> PreferenceGroup:
        group, other = dataset[place], dataset[int(before[place])]
        if group.ref_logps is not None:
            raise UserError(
                f"row {group.label} has a column of reference log-probs, and loss.loss_type kto needs those of other "
                "rows' completions, too: leave the columns out with data.columns: {ref_logps: null, ref_chosen_logps: "
                "null, ref_rejected_logps: null} to have the log-probs computed"
            )
        ids = np.concatenate([other.response_ids[0], *(other.cut or ())])
        room = None if max_length is None else max_length - len(group.prompt_ids)
        return replace(group, response_ids=(*group.response_ids, ids[:room]), cut=None)

    made = PreferenceDataset((mismatched(place) for place in range(len(dataset))), dataset.mixture)
    # The order is one of settings that a resumed run keeps.
    made.digest = sha256(f"{dataset.digest} {block}".encode()).hexdigest()
    return made
