"""The order of training data: optimizer step n of a run is a pure function of the plan, so a resume only needs n."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from .. import distributed, mesh, stop
from ..config.schema import PackingConfig, RunConfig, TrainConfig
from ..data.groups import PreferenceDataset, PreferenceGroup, split_mismatched
from ..errors import UserError
from ..packing import Pack, PackedBatch, Step, build_batch, plan_epoch
from ..packing.rows import RowPlan
from ..packing.transfer import gather, send
from .metrics import StepWork
from .throughput import FlopModel

STEPS_AHEAD = 3
"""Steps that are built before they are asked for, so that a delay of the host does not reach the device."""


@dataclass(frozen=True)
class TrainingPack:
    """One forward pass of a step."""

    batch: PackedBatch
    ref_logps_S: torch.Tensor | None
    """fp32 [S]: reference log-prob of each response; None without stored references."""
    counts: bool = True
    """Whether it is part of the step. Otherwise it only keeps this process in step with the others, with weight 0."""
    mismatched: TrainingPack | None = None
    """The same prompts with completions of other rows, for the divergence of KTO."""

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TrainingPack:
        """The same pack with ``change`` of each of its device-side tensors."""
        ref = None if self.ref_logps_S is None else change(self.ref_logps_S)
        other = None if self.mismatched is None else self.mismatched.map_tensors(change)
        return replace(self, batch=self.batch.map_tensors(change), ref_logps_S=ref, mismatched=other)

    def to(self, device: torch.device) -> TrainingPack:
        return self if self.batch.input_ids_T.device == device else send(self, device)


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step: what this process does of it."""

    number: int
    """1-based."""
    epoch: float
    """Epochs that are done when this step is."""
    packs: tuple[TrainingPack, ...]
    work: StepWork
    elsewhere: int = 0
    """``work.pairs`` of the other processes."""
    sources: np.ndarray | None = None
    """int64 [P]: the set of a mixture that each pair or ranking is of, in the order of the packs."""
    data: str = ""
    """Digest of the rows that the steps around it are of, the same on all processes."""

    @property
    def num_terms(self) -> int:
        """Losses that the whole step adds, one for each pair or ranking: what their sum is divided by."""
        return self.work.pairs + self.elsewhere

    @property
    def rows(self) -> list[int | str]:
        """Source row of each pair or ranking, in the order of the packs."""
        batches = [pack.batch for pack in self.packs if pack.counts]
        return [row for b in batches for row, n in zip(b.rows, b.terms_per_group, strict=True) for _ in range(n)]


def count_steps(groups: int, *, pairs_per_step: int, max_steps: int, epochs: float) -> int:
    """Optimizer steps of a run on so many preference groups; ``max_steps`` decides when it is positive."""
    return max_steps if max_steps > 0 else math.ceil(epochs * math.ceil(groups / pairs_per_step))


def total_steps(config: RunConfig, groups: int) -> int:
    """Optimizer steps of the run of ``config`` on so many preference groups."""
    train = config.train
    return count_steps(
        groups,
        pairs_per_step=config.packing.pairs_per_step,
        max_steps=train.max_steps,
        epochs=train.num_train_epochs,
    )


def drawn_groups(config: RunConfig, dataset: PreferenceDataset) -> PreferenceDataset:
    """The groups that the run of ``config`` takes: without those of a mixture that none of its epochs draws."""
    if dataset.mixture is None:
        return dataset
    steps_per_epoch = math.ceil(dataset.per_epoch / config.packing.pairs_per_step)
    epochs = math.ceil(total_steps(config, dataset.per_epoch) / steps_per_epoch)
    used = dataset.mixture.used(config.train.seed, epochs)
    return dataset if len(used) == len(dataset) else dataset.only(used)


class FeedError(UserError):
    """What ends a run while it reads its data. The steps before it are done."""


def build_pack(
    groups: Sequence[PreferenceGroup],
    refs_S: torch.Tensor | None,
    *,
    share_prompts: bool,
    rows_of: Callable[[PackedBatch], RowPlan | None] = lambda batch: None,
) -> TrainingPack:
    """The pack of some groups, on the CPU: what is learned from, and beside it the completions of other rows.

    Args:
        refs_S: reference log-probs of all their responses, in order.
    """
    own, others = split_mismatched(groups)
    if others is not None:
        both = partial(build_pack, share_prompts=share_prompts, rows_of=rows_of)
        sides = (None, None) if refs_S is None else (refs_S[0::2].contiguous(), refs_S[1::2].contiguous())
        return replace(both(own, sides[0]), mismatched=both(others, sides[1]))
    batch = build_batch(own, share_prompts=share_prompts)
    return TrainingPack(replace(batch, rows_plan=rows_of(batch)), refs_S)


class StepBuilder:
    """Builds steps of the groups of one dataset, on the host.

    Args:
        packing: with the layout that the policy has.
        lookup: reference log-probs (float32 [S]) of the responses of some groups, in order; None without references.
        flops: what ``perf/mfu`` counts.
        rows_of: the rows that the layout asks for.
    """

    def __init__(
        self,
        dataset: PreferenceDataset,
        packing: PackingConfig,
        *,
        lookup: Callable[[Pack], np.ndarray] | None,
        flops: FlopModel,
        device: torch.device,
        rows_of: Callable[[PackedBatch], RowPlan | None] = lambda batch: None,
    ):
        self.dataset = dataset
        self.packing = packing
        self.lookup = lookup
        self.flops = flops
        self.device = device
        self.rows_of = rows_of
        self.lengths = dataset.lengths
        self._terms_G = dataset.terms
        trained = dataset.trained
        self._packed_G = trained.packed(share_prompts=packing.share_prompts)
        # A row whose completion is another's has no tokens that count differently.
        self._completions_G = (dataset.counted if trained is dataset.lengths else trained).completions
        self._visible_G = trained.visible_pairs(share_prompts=packing.share_prompts)
        self._in_rows = packing.layout == "rows"
        self._shortest = int(self._packed_G.argmin())

    def plan(self, seed: int, epoch: int) -> list[Step]:
        """This process's packs in the steps of an epoch."""
        places = {"ranks": mesh.data_size(), "rank": mesh.data_rank()}
        members = self.dataset.epoch(seed, epoch)
        return plan_epoch(self.lengths, self.packing, seed=seed, epoch=epoch, members=members, **places)

    def build(self, members: Step, number: int, epoch: float) -> TrainingStep:
        """This process's part of step ``number``."""
        packs = tuple(self._build_pack(pack) for pack in members)
        sources = None
        if self.dataset.source_names:
            groups = [i for pack in members for i in pack]
            sources = self.dataset.sources[groups].repeat(self._terms_G[groups])
        work = self._work(members, packs)
        return TrainingStep(number, epoch, packs, work, sources=sources, data=self.dataset.digest)

    def _build_pack(self, pack: Pack) -> TrainingPack:
        if not pack:
            return replace(self._build_pack((self._shortest,)), counts=False)
        refs_S = None if self.lookup is None else torch.from_numpy(self.lookup(pack))
        groups = [self.dataset[i] for i in pack]
        built = build_pack(groups, refs_S, share_prompts=self.packing.share_prompts, rows_of=self.rows_of)
        return gather(built, pin=True) if self.device.type == "cuda" else built

    def _work(self, members: Step, packs: tuple[TrainingPack, ...]) -> StepWork:
        groups = [i for pack in members for i in pack]
        rows = sum(self._cells(p.batch) for p in packs)
        mixers = [p.batch.rows_plan for p in packs if p.batch.rows_plan is not None and not self._in_rows]
        return StepWork(
            pairs=int(self._terms_G[groups].sum()),
            unshared_tokens=sum(p.batch.num_unshared_tokens for p in packs if p.counts),
            packed_tokens=int(self._packed_G[groups].sum()),
            rows=rows,
            flop=self.flops.step(rows, int(self._completions_G[groups].sum()), int(self._visible_G[groups].sum())),
            mixer_tokens=sum(plan.num_row_tokens for plan in mixers),
            mixer_cells=sum(plan.num_cells for plan in mixers),
        )

    def _cells(self, batch: PackedBatch) -> int:
        """Rows that go through the model, padding included."""
        return batch.rows_plan.num_cells if self._in_rows and batch.rows_plan is not None else batch.num_tokens


class TrainingFeed:
    """The steps of a run, built in the background while those before run.

    Args:
        dataset: what is trained on.
        packing: with the layout that the policy has.
        options: further ones of ``StepBuilder``.
    """

    def __init__(self, dataset: PreferenceDataset, packing: PackingConfig, train: TrainConfig, **options: Any):
        self.builder = StepBuilder(dataset, packing, **options)
        self.device = self.builder.device
        self.seed = train.seed
        self.waited = 0.0
        """Seconds that ``steps`` waited for a step to be built. The first one has nothing to hide behind."""
        self.steps_per_epoch = math.ceil(dataset.per_epoch / packing.pairs_per_step)
        self.total_steps = count_steps(
            dataset.per_epoch,
            pairs_per_step=packing.pairs_per_step,
            max_steps=train.max_steps,
            epochs=train.num_train_epochs,
        )
        # Two epochs: the last step of one is built while the first of the next is.
        self._plan = lru_cache(maxsize=2)(partial(self.builder.plan, self.seed))

    def steps(self, done: int) -> Iterator[TrainingStep]:
        """The steps after the first ``done``, on the device.

        Raises:
            Stopped: before a step, on all ranks, when any process was asked to end.
            FeedError: on all ranks, before a step whose data cannot be read.
        """
        if done >= self.total_steps:
            return
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        try:
            soon = range(done + 1, min(done + STEPS_AHEAD, self.total_steps) + 1)
            ahead: deque[Future[TrainingStep]] = deque(pool.submit(self.build, number) for number in soon)
            for number in range(done + 1, self.total_steps + 1):
                asked = time.perf_counter()
                step, fault = self._built(ahead.popleft())
                self.waited += time.perf_counter() - asked
                if number + STEPS_AHEAD <= self.total_steps:
                    ahead.append(pool.submit(self.build, number + STEPS_AHEAD))
                pairs, data = (0, "") if step is None else (step.work.pairs, step.data)
                told = distributed.gather((pairs, stop.requested(), fault, data))
                stop.heed(request for _, request, _, _ in told)
                if faults := [fault for _, _, fault, _ in told if fault]:
                    raise FeedError(faults[0])
                if len({data for *_, data in told}) > 1:
                    raise FeedError("processes have read different rows: give all of them the same data")
                assert step is not None
                elsewhere = sum(n for n, *_ in told[:: mesh.context_size()]) - pairs
                yield replace(step, packs=tuple(p.to(self.device) for p in step.packs), elsewhere=elsewhere)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.close()

    def _built(self, future: Future[TrainingStep]) -> tuple[TrainingStep | None, str]:
        """A step, or why there is none."""
        try:
            return future.result(), ""
        except UserError as error:
            return None, str(error)

    def build(self, number: int) -> TrainingStep:
        """This process's part of step ``number`` (1-based), on the host."""
        epoch, place = divmod(number - 1, self.steps_per_epoch)
        return self.builder.build(self._plan(epoch)[place], number, number / self.steps_per_epoch)

    def close(self) -> None:
        """Called once no further step is wanted."""

    def place(self, done: int) -> dict[str, Any] | None:
        """JSON values for ``go_on`` after so many steps; None where their number is all that is needed."""
        return None

    def go_on(self, place: dict[str, Any] | None, done: int) -> None:
        """Be ready for the steps after the first ``done``, which ``place`` was asked for; None of a run that read its
        data whole.

        Raises:
            UserError: the data is not where ``place`` says.
        """
