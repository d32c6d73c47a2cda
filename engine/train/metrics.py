"""Metrics of a training run: what is averaged, what is written, and where it goes.

Names and averages are TRL's: every value is a mean over the pairs of a step, then over the steps of the logging
interval. Of unpaired rows, chosen are the desirable ones and rejected the others, each side's mean is over its own rows
and the steps that have one; an accuracy is the share of rows whose reward lies on the right side of beta times ``kl``,
the divergence of KTO (0 without it); ``count/chosen`` and ``count/rejected`` are rows of a step.
``grad_norm`` (before clipping) and ``learning_rate`` are those of the last step. ``TOKEN_NAMES`` are means
over the completion tokens of a step instead: of the mean logit over the vocabulary, for chosen and for rejected
responses; of the entropy, over both; of the hits of the largest logit, over the chosen ones. TRL takes them over a
micro-batch, and their mean over micro-batches: the same without accumulation. ``aux_loss`` is the load-balancing loss
of a mixture of experts, which ``loss`` has in it with its coefficient. ``experts/layer_<n>/busiest`` and ``.../idlest``
are the shares that these experts have of the places that the tokens of the interval took in a layer, even shares being
one over the number of experts; ``experts/busiest`` is the largest of them over layers, ``experts/idlest`` the smallest.
``num_tokens`` counts prompt and response of every sequence that is learned from, so the prompt of a pair twice, however
it was computed, and so does ``perf/tokens_per_second``; times ``1 - perf/shared_fraction`` it is the tokens that went
through the model.
``perf/mixer_padding`` is there where some modules get rows: the share of what these compute that is padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .. import distributed, mesh
from ..run_folder import EXPERT_LAYER, EXPERTS
from .throughput import Stopwatch, peak_memory_gib

PREFERENCE_NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
TOKEN_NAMES = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")


@dataclass(frozen=True)
class StepWork:
    """What one process did of an optimizer step."""

    pairs: int
    unshared_tokens: int
    """Prompt and response of every sequence: what TRL counts."""
    packed_tokens: int
    """Tokens that went through the model, the shared prompt once."""
    rows: int
    """Rows of the packs, padding included."""
    flop: float
    mixer_tokens: int = 0
    """Tokens of the rows of modules that get some in packs."""
    mixer_cells: int = 0
    """The same with their padding."""


class IntervalMeter:
    """Sums over a logging interval, kept on the device until a row is asked for. Rows are of all processes together.

    Args:
        peak_flops: of all processes together.
    """

    def __init__(self, device: torch.device, *, peak_flops: float):
        self.device = device
        self.peak_flops = peak_flops
        self.watch = Stopwatch(device)
        self.num_tokens = 0
        self._reset()

    def _reset(self) -> None:
        sizes = (len(PREFERENCE_NAMES), len(TOKEN_NAMES))
        self._sums, self._token_sums = (torch.zeros(n, dtype=torch.float64, device=self.device) for n in sizes)
        # Steps that have a value: without a row of a label there is none of its side.
        self._known, self._tokens_known = torch.zeros_like(self._sums), torch.zeros_like(self._token_sums)
        self._further: dict[str, Tensor] = {}
        self._steps = 0
        self._aux_sum: Tensor | None = None
        self._expert_tokens: list[Tensor] = []
        self._work: list[StepWork] = []
        self._since = self.watch.total

    def add(
        self,
        values: Tensor,
        work: StepWork,
        *,
        aux_loss: Tensor | None = None,
        expert_tokens: Sequence[Tensor] = (),
        further: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Count one step.

        Args:
            values: [7], the means of the step over all processes, in the order of ``PREFERENCE_NAMES``, on the device;
                or [11], followed by those of ``TOKEN_NAMES``. NaN where the step has none.
            work: of this process.
            further: further metrics of every step, by name, a float64 scalar each.
            aux_loss: the load-balancing loss of the step over all processes, a float64 scalar.
            expert_tokens: float64 [experts] for each layer with experts: the tokens of this process that went to each.
        """
        first = len(PREFERENCE_NAMES)
        _add(self._sums, self._known, values[:first])
        if len(values) > first:
            _add(self._token_sums, self._tokens_known, values[first:])
        for name, value in further.items():
            self._further[name] = self._further[name] + value if name in self._further else value
        if aux_loss is not None:
            self._aux_sum = aux_loss if self._aux_sum is None else self._aux_sum + aux_loss
        if self._expert_tokens:
            self._expert_tokens = [a + b for a, b in zip(self._expert_tokens, expert_tokens, strict=True)]
        else:
            self._expert_tokens = list(expert_tokens)
        self._steps += 1
        self._work.append(work)

    def row(self, *, step: int, epoch: float, grad_norm: Tensor, learning_rate: float) -> dict[str, float]:
        """The metrics of the interval; the next one starts. Waits for the device."""
        sums = torch.cat([self._sums, self._token_sums])
        known = torch.cat([self._known, self._tokens_known])
        values = dict(zip(PREFERENCE_NAMES + TOKEN_NAMES, (sums / known).tolist(), strict=True))
        means = {name: value for name, value in values.items() if not math.isnan(value)}
        seconds = self.watch.seconds()
        elapsed = max(seconds - self._since, 1e-9)
        total = _total(self._work)
        self.num_tokens += total.unshared_tokens
        row: dict[str, float] = {"step": step, "epoch": round(epoch, 6), "loss": means.pop("loss", 0.0)}
        row |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
        row |= means
        row |= {name: total.item() / self._steps for name, total in self._further.items()}
        if self._aux_sum is not None:
            row["aux_loss"] = self._aux_sum.item() / self._steps
        row |= _expert_shares(self._expert_tokens)
        row |= {
            "num_tokens": self.num_tokens,
            "perf/tokens_per_second": total.unshared_tokens / elapsed,
            "perf/pairs_per_second": total.pairs / elapsed,
            "perf/mfu": total.flop / elapsed / self.peak_flops,
            "perf/padding_fraction": 1 - total.packed_tokens / max(total.rows, 1),
            **({"perf/mixer_padding": 1 - total.mixer_tokens / total.mixer_cells} if total.mixer_cells else {}),
            "perf/shared_fraction": 1 - total.packed_tokens / max(total.unshared_tokens, 1),
            "perf/peak_memory_gib": max(distributed.gather(peak_memory_gib(self.device))),
        }
        self._reset()
        self._since = seconds
        return row

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs so that the next row is the same after a resume, apart from its speeds."""
        tokens = self.num_tokens + _total(self._work).unshared_tokens
        state = {"num_tokens": tokens, "steps": self._steps, "sums": self._sums.tolist(), "known": self._known.tolist()}
        state |= {"token_sums": self._token_sums.tolist(), "tokens_known": self._tokens_known.tolist()}
        state["further"] = {name: total.item() for name, total in self._further.items()}
        if self._aux_sum is not None:
            state["aux_sum"] = self._aux_sum.item()
        if self._expert_tokens:
            # Of all processes: the next row may be of another number of them.
            state["expert_tokens"] = [layer.tolist() for layer in _over_ranks(self._expert_tokens)]
        return state

    def _numbers(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def load(self, state: Mapping[str, Any]) -> None:
        self._reset()
        self.num_tokens = state["num_tokens"]
        self._steps = state["steps"]
        self._sums = self._numbers(state["sums"])
        # Earlier checkpoints lack some, and have a value in every step.
        self._known = self._numbers(state.get("known", [self._steps] * len(PREFERENCE_NAMES)))
        self._token_sums = self._numbers(state.get("token_sums", [0.0] * len(TOKEN_NAMES)))
        self._tokens_known = self._numbers(state.get("tokens_known", [state.get("token_steps", 0)] * len(TOKEN_NAMES)))
        self._further = {name: self._numbers(total) for name, total in state.get("further", {}).items()}
        if "aux_sum" in state:
            self._aux_sum = torch.tensor(state["aux_sum"], dtype=torch.float64, device=self.device)
        own = 1.0 if distributed.is_main() else 0.0
        layers = [torch.tensor(tokens, dtype=torch.float64) for tokens in state.get("expert_tokens", ())]
        self._expert_tokens = [own * layer.to(self.device) for layer in layers]


def _add(sums: Tensor, known: Tensor, values: Tensor) -> None:
    """Add the values that are numbers, and count them."""
    there = ~values.isnan()
    sums += values.where(there, torch.zeros_like(values))
    known += there


def _over_ranks(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    flat = distributed.sum_over_ranks(torch.cat(list(layers)))
    return flat.split([len(layer) for layer in layers])


def _expert_shares(layers: Sequence[Tensor]) -> dict[str, float]:
    """The share of the busiest and of the idlest expert of each layer, and over layers; nothing without experts."""
    if not layers:
        return {}
    shares = [(counts / counts.sum()).tolist() for counts in (layer.cpu() for layer in _over_ranks(layers))]
    row = {f"{EXPERTS}busiest": max(map(max, shares)), f"{EXPERTS}idlest": min(map(min, shares))}
    for n, layer in enumerate(shares):
        row |= {f"{EXPERT_LAYER}{n}/busiest": max(layer), f"{EXPERT_LAYER}{n}/idlest": min(layer)}
    return row


def _total(work: Sequence[StepWork]) -> StepWork:
    """The sum over steps and processes."""
    own = _sum(work)
    return own if distributed.size() == 1 else _sum(mesh.gather(own))


def _sum(work: Sequence[StepWork]) -> StepWork:
    return StepWork(**{f.name: sum(getattr(w, f.name) for w in work) for f in fields(StepWork)})
