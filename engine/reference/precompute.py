"""Fill the reference store: one forward pass over the responses that it lacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import distributed, mesh, stop
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..errors import UserError, counted, out_of_memory
from ..packing import Pack, PackedBatch, build_batch, check_fits, group_costs, pack_lengths
from ..shared_folders import check_shared
from .keys import ModelIdentity, dataset_keys, identify
from .provenance import note_profile, why_absent
from .store import TOKENS_PER_SHARD, ReferenceStore

if TYPE_CHECKING:
    from ..model.policy import Policy

log = logging.getLogger(__name__)

FLUSH_SECONDS = 30.0
"""At most this much work is lost when the process is killed."""


@dataclass(frozen=True)
class PrecomputeReport:
    """What a pass over a dataset did."""

    computed_rows: int
    """Rows with at least one response that was not stored."""
    reused_rows: int
    seconds: float
    """Of the forward passes and of writing, without hashing the model."""
    tokens: int
    """Packed tokens that went through the model, of all processes."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def rows_per_second(self) -> float:
        return self.computed_rows / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if not self.computed_rows:
            return f"{self.reused_rows} rows reused, none computed"
        return (
            f"{self.computed_rows} rows computed, {self.reused_rows} reused, in {self.seconds:.1f} s "
            f"({self.rows_per_second:.1f} rows/s, {self.tokens_per_second:,.0f} tokens/s)"
        )


class _Work(NamedTuple):
    """The responses of one group that no earlier group has; ``group`` is its place in the dataset."""

    group: int
    responses: tuple[int, ...]
    keys: tuple[bytes, ...]


def precompute(
    policy: Policy,
    dataset: PreferenceDataset,
    store: ReferenceStore,
    *,
    tokens_per_pack: int,
    share_prompts: bool = True,
    identity: ModelIdentity | None = None,
    progress: bool = True,
    flush_seconds: float = FLUSH_SECONDS,
) -> PrecomputeReport:
    """Compute the per-token log-probs of every response that ``store`` lacks, with ``policy`` in reference mode.

    Packs are planned over the whole dataset and stored whole, so a pass that was killed and started again runs the very
    packs that were left, and ends with the same bits as one that was not. Rows that fell out of a pack because the rest
    of it is stored already (a changed row) are packed anew. A response that occurs in several rows is computed once.

    Several processes divide the packs among them; all must call this, and when it returns all of it is stored.

    Args:
        policy: any state of training mode; it is left as it was, and no random number is drawn.
        dataset: groups of K responses.
        store: where values are looked up and added.
        tokens_per_pack: most tokens in one forward pass.
        share_prompts: lay each prompt out once for all its responses.
        identity: ``identify(policy)``, when it is known already.
        progress: show a progress bar.
        flush_seconds: how often what is computed becomes durable.

    Raises:
        UserError: a group longer than ``tokens_per_pack``, no memory for a pack, a log-prob that is not finite, or a
            store that cannot be written.
        Stopped: on all ranks, when any process was asked to end; what is computed is stored.
    """
    in_rows = policy.layout.in_rows
    share_prompts = share_prompts and not in_rows
    check_fits(dataset, tokens_per_pack=tokens_per_pack, share_prompts=share_prompts, in_rows=in_rows)
    identity = identity or identify(policy)
    keys = dataset_keys(dataset, identity.digest)
    flat = [key for group in keys for key in group]
    # Asked once: the others must not see what a faster process has added since.
    absent = set(distributed.broadcast(store.missing(flat) if distributed.is_main() else []))
    computed_rows = sum(any(key in absent for key in group) for group in keys)
    start = time.perf_counter()
    tokens = 0
    if absent:
        if distributed.is_main():
            _explain_absence(store, identity)
        # Inside, since what a killed writer leaves there goes.
        check_shared(store.folder(flat[0]), f"reference.store={store.path}")
        divide = partial(pack_lengths, tokens_per_pack=tokens_per_pack, share_prompts=share_prompts, in_rows=in_rows)
        packs = _plan(dataset, keys, absent, divide)
        # The first pack may take a minute.
        log.info(
            "reference log-probs: %s of %s rows are not stored; they are computed now, in %s",
            f"{computed_rows:,}",
            f"{len(dataset):,}",
            counted(len(packs), "pack"),
        )
        try:
            tokens = _run(policy, dataset, packs, _Buffer(store, flush_seconds), share_prompts, progress)
            tokens = sum(mesh.gather(tokens))
        except Exception as error:
            if isinstance(error, UserError) or (memory := out_of_memory(error)) is None:
                raise
            raise UserError(
                f"out of {memory} with packs of {tokens_per_pack} tokens: lower packing.tokens_per_pack"
            ) from error
    return PrecomputeReport(computed_rows, len(dataset) - computed_rows, time.perf_counter() - start, tokens)


def _explain_absence(store: ReferenceStore, identity: ModelIdentity) -> None:
    why = why_absent(store, identity)
    if why is not None:
        log.info("reference log-probs: %s", why)
    note_profile(store, identity)


def _plan(
    dataset: PreferenceDataset,
    keys: list[tuple[bytes, ...]],
    absent: set[bytes],
    divide: Callable[[list[np.ndarray]], list[Pack]],
) -> list[list[_Work]]:
    """Packs to run: those of the whole dataset that lack every key, then the rest of what is absent, packed anew."""
    lengths = dataset.lengths

    def pack(work: list[_Work]) -> list[list[_Work]]:
        return [[work[i] for i in members] for members in divide(_lengths(lengths, work))]

    untouched: list[list[_Work]] = []
    leftover: list[_Work] = []
    for members in pack(_unique_work(keys)):
        if all(key in absent for w in members for key in w.keys):
            untouched.append(members)
        else:
            leftover += (_restrict(w, absent) for w in members)
    return untouched + pack([w for w in leftover if w.keys])


def _lengths(lengths: Sequence[np.ndarray], work: list[_Work]) -> list[np.ndarray]:
    return [lengths[w.group][[0, *(1 + k for k in w.responses)]] for w in work]


def _unique_work(keys: list[tuple[bytes, ...]]) -> list[_Work]:
    seen: set[bytes] = set()
    work = []
    for index, group in enumerate(keys):
        fresh = tuple(k for k, key in enumerate(group) if key not in seen and key not in group[:k])
        seen.update(group)
        if fresh:
            work.append(_Work(index, fresh, tuple(group[k] for k in fresh)))
    return work


def _restrict(work: _Work, absent: set[bytes]) -> _Work:
    kept = [i for i, key in enumerate(work.keys) if key in absent]
    return _Work(work.group, tuple(work.responses[i] for i in kept), tuple(work.keys[i] for i in kept))


class _Buffer:
    """Collects computed values and makes them durable now and then."""

    def __init__(self, store: ReferenceStore, flush_seconds: float):
        self._store = store
        self._flush_seconds = flush_seconds
        self._values: dict[bytes, np.ndarray] = {}
        self._tokens = 0
        self._flushed = time.perf_counter()

    def add(self, values: dict[bytes, np.ndarray]) -> None:
        self._values.update(values)
        self._tokens += sum(len(v) for v in values.values())
        if self._tokens >= TOKENS_PER_SHARD or time.perf_counter() - self._flushed >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        values, self._values, self._tokens = self._values, {}, 0
        self._store.add(values)
        self._flushed = time.perf_counter()


def _run(
    policy: Policy,
    dataset: PreferenceDataset,
    packs: list[list[_Work]],
    buffer: _Buffer,
    share_prompts: bool,
    progress: bool,
) -> int:
    """Run this process's packs; the number of tokens that went through the model."""
    tokens = 0
    lengths = dataset.lengths
    costs = [int(group_costs(_lengths(lengths, members), share_prompts=share_prompts).sum()) for members in packs]
    share = mesh.own_share(costs)
    counted = [i is not None for i in share]
    # Forward passes of a sharded model are joint: who has no pack left runs the cheapest one again.
    cheapest = costs.index(min(costs))
    own = [packs[cheapest if i is None else i] for i in share]
    batches = (build_batch(_groups(dataset, members), share_prompts=share_prompts) for members in own)
    rows = sum(map(len, own))
    bar = tqdm(total=rows, desc="reference log-probs", unit="row", disable=not (progress and distributed.is_main()))
    with bar, scoring(policy), stop.postponed("what is computed is stored first"):
        try:
            for members, (batch, logps_N), counts in zip(own, score(policy, batches), counted, strict=True):
                if counts and mesh.context_rank() == 0:
                    buffer.add(_split(members, batch, logps_N, policy.compute_dtype))
                    tokens += batch.num_tokens
                    bar.update(len(members))
                stop.check()
        finally:
            # After an error or Ctrl-C, too: what is computed need not be computed again.
            buffer.flush()
    return tokens


@contextmanager
def scoring(policy: Policy) -> Iterator[None]:
    """The policy as reference: adapters and dropout off, no autograd; restored on the way out."""
    training = policy.training
    policy.eval()
    try:
        # Not inference_mode: a model may cache tensors in forward that training then needs in autograd.
        with policy.reference_mode(), torch.no_grad():
            yield
    finally:
        policy.train(training)


def score(policy: Policy, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, np.ndarray]]:
    """Each batch with its log-probs, float32 [N] on the host; to be run inside ``scoring``.

    A batch is handed out after the next one was launched, so that the host's work hides behind the device's.
    """
    launched: tuple[PackedBatch, torch.Tensor] | None = None
    for batch in batches:
        moved = batch.to(policy.device)
        previous, launched = launched, (moved, policy.logps(moved))
        if previous is not None:
            yield previous[0], previous[1].float().cpu().numpy()
    if launched is not None:
        yield launched[0], launched[1].float().cpu().numpy()


def _groups(dataset: PreferenceDataset, members: list[_Work]) -> list[PreferenceGroup]:
    groups = ((dataset[w.group], w.responses) for w in members)
    # Without its pairs, which number the responses of the whole group, and with every token.
    return [
        replace(g.whole, response_ids=tuple(g.response_ids[k] for k in responses), pairs=None)
        for g, responses in groups
    ]


def _split(
    members: list[_Work], batch: PackedBatch, logps_N: np.ndarray, dtype: torch.dtype
) -> dict[bytes, np.ndarray]:
    """The log-probs of a pack by key."""
    owners = [(row, key) for row, w in zip(batch.rows, members, strict=True) for key in w.keys]
    parts = np.split(logps_N, batch.cu_responses_S1[1:-1].tolist())
    for (row, _), part in zip(owners, parts, strict=True):
        if not np.isfinite(part).all():
            wider = "" if dtype == torch.float32 else ", or use model.dtype=float32"
            raise UserError(
                f"row {row}: the reference model gives a log-prob that is not finite; check the model's weights{wider}"
            )
    return {key: part for (_, key), part in zip(owners, parts, strict=True)}
