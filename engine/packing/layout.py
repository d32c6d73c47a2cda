"""How groups lie in a pack.

A group is laid out once as ``prompt, response_1, ..., response_K``. Each response restarts its positions at the length
of the prompt. Attention is causal within segments: the first is ``prompt ++ response_1``; response k > 1 is a segment
of its own whose keys are ``prompt ++ response_k``. So the prompt is computed once, and no token sees another response.

Shape suffixes: T packed tokens, N completion tokens, S responses, P pairs, Q query segments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from .. import mesh
from ..data.groups import PreferenceGroup, pair_places
from .gather import gather_rows, pick_order
from .rows import RowPlan, Segment
from .slices import Slice, own_slice
from .transfer import send


# not frozen: of frozen ones torch 2.11 compiles every field in, so that each pack would compile compiled blocks again
@dataclass(eq=False)
class AttentionPlan:
    """Everything that an attention backend needs to know of a pack. Queries are in packed order."""

    segments: tuple[Segment, ...]
    cu_seqlens_q: torch.Tensor
    """int32 [Q + 1]."""
    cu_seqlens_k: torch.Tensor
    """int32 [Q + 1]; offsets into the keys gathered by ``key_rows``."""
    key_rows: torch.Tensor | None
    """int64 [keys]: packed row of each key, or None when the keys are the packed rows in order."""
    max_seqlen_q: int
    max_seqlen_k: int
    key_order: torch.Tensor | None = None
    """int64 [keys], and ``key_counts``: what ``pick_order`` gives for ``key_rows``."""
    key_counts: tuple[int, ...] = ()
    divided: bool = False
    """Whether the tokens lie on several processes, which attention brings together."""
    masks: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)
    """Masks, and what is like them, that a backend made for this pack, so that layers share them."""
    readers: set[str] = field(default_factory=set, init=False, repr=False)
    """Types of the modules that asked for attention over this pack, so that a check can name those that did not."""

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> AttentionPlan:
        """The same plan with ``change`` of each of its tensors."""
        return replace(self, **_changed(self, change))

    def gather_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [keys, ...] of the query segments, one after another, from packed rows [T, ...]; these
        themselves where no prompt has a second response."""
        if self.key_rows is None or self.key_order is None:
            return x
        return gather_rows(x, self.key_rows, self.key_order, self.key_counts)


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass over whole groups.

    Responses are in the order of the groups: ``group_0.response_0, group_0.response_1, group_1.response_0, ...``.
    """

    input_ids_T: torch.Tensor
    """int64 [T]."""
    position_ids_T: torch.Tensor
    """int64 [T]."""
    repeats_T: torch.Tensor
    """int64 [T]: how many responses read each token: all those of its group where a prompt is shared, else one."""
    plan: AttentionPlan
    rows_N: torch.Tensor
    """int64 [N]: packed row whose hidden state predicts each completion token. The last row of a shared prompt occurs
    once per response."""
    labels_N: torch.Tensor
    """int64 [N]: the completion tokens that count, all but those of weight 0."""
    cu_responses_S1: torch.Tensor
    """int32 [S + 1], always on the CPU: where each response starts in ``labels_N``."""
    lengths_S: torch.Tensor
    """int64 [S]: completion tokens of each response that count."""
    responses_per_group: tuple[int, ...]
    rows: tuple[int | str, ...]
    """Source row of each group, for messages."""
    terms_per_group: tuple[int, ...]
    """Losses of each group: one for each of its pairs, or one in all."""
    pairs_P2: torch.Tensor | None
    """int64 [P, 2]: (chosen, rejected) responses of every pair; None when every group is one pair or one ranking."""
    num_chosen_tokens: int
    """Tokens that count of the chosen response of every pair, or of the best of a ranking."""
    num_unshared_tokens: int
    """Tokens that the same responses have with the prompt repeated for each."""
    rows_order_N: torch.Tensor
    """int64 [N], and ``rows_counts``: what ``pick_order`` gives for ``rows_N``."""
    rows_counts: tuple[int, ...]
    desirable: tuple[bool, ...] | None = None
    """Labels of groups that are unpaired rows; None where groups are others."""
    pair_weights_P: torch.Tensor | None = None
    """fp32, one for each loss in the order of ``terms_per_group``: what it is multiplied by. None: 1 each."""
    margins_P: torch.Tensor | None = None
    """fp32, alike: by how much its reward margin is to be exceeded. None: 0 each."""
    token_weights_N: torch.Tensor | None = None
    """fp32 [N]: weights of the completion tokens; None: 1 each."""
    rows_plan: RowPlan | None = None
    """The same tokens as rows, where the layout of a model asks for them and they were built with the pack."""
    own: Slice | None = None
    """Where several processes work on the pack: this one's part of it."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.numel()

    @property
    def num_groups(self) -> int:
        return len(self.rows)

    @property
    def num_responses(self) -> int:
        return self.cu_responses_S1.numel() - 1

    @property
    def own_repeats(self) -> torch.Tensor:
        """``repeats_T`` of the tokens that this process works on."""
        return self.repeats_T if self.own is None else self.own.repeats_L

    @property
    def own_labels(self) -> torch.Tensor:
        """``labels_N`` of the tokens whose hidden states this process has, in the order of ``gather_predicting``."""
        return self.labels_N if self.own is None else self.own.labels_M

    def collect(self, own_N: torch.Tensor) -> torch.Tensor:
        """Values [N, ...] of the completion tokens, from those of ``own_labels``."""
        return own_N if self.own is None else self.own.collect(own_N)

    def gather_predicting(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[N, D]: the hidden states that predict the completion tokens, from those of all packed rows."""
        if self.own is not None:
            return self.own.gather_predicting(hidden_TD)
        return gather_rows(hidden_TD, self.rows_N, self.rows_order_N, self.rows_counts)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its device-side tensors on ``device``; ``cu_responses_S1`` stays on the CPU."""
        device = torch.device(device)
        return self if self.input_ids_T.device == device else send(self, device)

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """The same batch with ``change`` of each of its device-side tensors."""
        changes = _changed(self, change, skipped="cu_responses_S1")
        rows_plan = None if self.rows_plan is None else self.rows_plan.map_tensors(change)
        own = None if self.own is None else self.own.map_tensors(change)
        return replace(self, **changes, plan=self.plan.map_tensors(change), rows_plan=rows_plan, own=own)


def _changed(
    record: AttentionPlan | PackedBatch, change: Callable[[torch.Tensor], torch.Tensor], *, skipped: str = ""
) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in fields(record) if f.name != skipped}
    return {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}


def build_batch(groups: Sequence[PreferenceGroup], *, share_prompts: bool = True) -> PackedBatch:
    """Lay out ``groups`` in one pack, on the CPU.

    Args:
        groups: at least one; each with a prompt of at least one token and responses of at least one token.
        share_prompts: lay each prompt out once; otherwise every response is a sequence of its own.

    Raises:
        ValueError: an empty prompt or response, or a response none of whose tokens counts.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    repeats: list[np.ndarray] = []
    predicting: list[np.ndarray] = []
    segments: list[Segment] = []
    end = 0
    unshared = 0
    for group in groups:
        prompt = group.prompt_ids
        if not len(prompt) or not all(len(r) for r in group.response_ids):
            raise ValueError(f"row {group.label}: the prompt and every response need at least one token")
        prompt_start = end
        for k, response in enumerate(group.response_ids):
            unshared += len(prompt) + len(response)
            if k == 0 or not share_prompts:
                prompt_start, start = end, end
                ids += [prompt, response]
                positions.append(np.arange(len(prompt) + len(response)))
                readers = len(group.response_ids) if share_prompts else 1
                repeats += [np.full(len(prompt), readers), np.ones(len(response))]
                end += len(prompt) + len(response)
                segments.append(Segment(start, end, start, start))
            else:
                start = end
                ids.append(response)
                positions.append(np.arange(len(prompt), len(prompt) + len(response)))
                repeats.append(np.ones(len(response)))
                end += len(response)
                segments.append(Segment(start, end, prompt_start, prompt_start + len(prompt)))
            predicting.append(np.arange(end - len(response) - 1, end - 1))
            predicting[-1][0] = prompt_start + len(prompt) - 1
    responses = [r for g in groups for r in g.response_ids]
    weights = _token_weights(groups)
    if weights is not None:
        predicting, responses, weights = (
            [part[w != 0] for part, w in zip(parts, weights, strict=True)] for parts in (predicting, responses, weights)
        )
    counted = [len(r) for r in responses]
    rows_N = np.concatenate(predicting)
    rows_order_N, rows_counts = pick_order(rows_N)
    ids_T, positions_T, repeats_T = _int64(ids), _int64(positions), _int64(repeats)
    labels_N = _int64(responses)
    return PackedBatch(
        input_ids_T=ids_T,
        position_ids_T=positions_T,
        repeats_T=repeats_T,
        plan=replace(plan_attention(segments), divided=mesh.context_size() > 1),
        rows_N=_int64([rows_N]),
        labels_N=labels_N,
        cu_responses_S1=_cumulative(counted),
        lengths_S=torch.tensor(counted),
        responses_per_group=tuple(len(g.response_ids) for g in groups),
        rows=tuple(g.label for g in groups),
        terms_per_group=tuple(len(g.pairs or (0,)) for g in groups),
        pairs_P2=_pairs(groups),
        num_chosen_tokens=_chosen_tokens(groups, counted),
        num_unshared_tokens=unshared,
        rows_order_N=_int64([rows_order_N]),
        rows_counts=rows_counts,
        desirable=None if groups[0].desirable is None else tuple(bool(g.desirable) for g in groups),
        pair_weights_P=_of_terms([g.weight for g in groups], groups, usual=1.0),
        margins_P=_of_terms([g.margin for g in groups], groups, usual=0.0),
        token_weights_N=_other_than_one(weights),
        own=own_slice(ids_T, positions_T, repeats_T, rows_N, labels_N),
    )


def _pairs(groups: Sequence[PreferenceGroup]) -> torch.Tensor | None:
    """Those of all groups, where these are more than one each."""
    places_P2 = pair_places(groups)
    return None if places_P2 is None else torch.from_numpy(places_P2)


def _token_weights(groups: Sequence[PreferenceGroup]) -> list[np.ndarray] | None:
    """Those of every response; None where all tokens count alike."""
    if all(g.token_weights is None for g in groups):
        return None
    weights: list[np.ndarray] = []
    for group in groups:
        given = group.token_weights or tuple(np.ones(len(r), np.float32) for r in group.response_ids)
        if not all(w.any() for w in given):
            raise ValueError(f"row {group.row}: no token of a response counts")
        weights += given
    return weights


def _chosen_tokens(groups: Sequence[PreferenceGroup], counted: Sequence[int]) -> int:
    """Of the tokens that count in each response, those of the better response of every pair."""
    total = first = 0
    for group in groups:
        total += sum(counted[first + best] for best, _ in group.pairs or ((0, 1),))
        first += len(group.response_ids)
    return total


def _of_terms(values: list[float], groups: Sequence[PreferenceGroup], *, usual: float) -> torch.Tensor | None:
    """fp32 [P]: the number of each group for each of its losses; None where all are as usual."""
    if all(value == usual for value in values):
        return None
    return torch.tensor([v for g, v in zip(groups, values, strict=True) for _ in g.pairs or (0,)], dtype=torch.float32)


def _other_than_one(weights: list[np.ndarray] | None) -> torch.Tensor | None:
    if weights is None:
        return None
    weights_N = torch.from_numpy(np.concatenate(weights).astype(np.float32))
    return None if bool((weights_N == 1).all()) else weights_N


def plan_attention(segments: list[Segment]) -> AttentionPlan:
    """The plan of a pack that consists of ``segments``, on the CPU."""
    key_rows = key_order = None
    key_counts: tuple[int, ...] = ()
    if any(s.prefix_stop > s.prefix_start for s in segments):
        rows = np.concatenate([np.r_[s.prefix_start : s.prefix_stop, s.start : s.stop] for s in segments])
        order, key_counts = pick_order(rows)
        key_rows, key_order = _int64([rows]), _int64([order])
    return AttentionPlan(
        segments=tuple(segments),
        cu_seqlens_q=_cumulative([s.num_queries for s in segments]),
        cu_seqlens_k=_cumulative([s.num_keys for s in segments]),
        key_rows=key_rows,
        max_seqlen_q=max(s.num_queries for s in segments),
        max_seqlen_k=max(s.num_keys for s in segments),
        key_order=key_order,
        key_counts=key_counts,
    )


def _int64(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))


def _cumulative(sizes: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int32))
