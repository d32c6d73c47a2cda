"""Time, memory and error of contenders on one task, measured in one run.

Legend: N rows, D features, V vocabulary, n rows of a block, S responses, G products of 2 N D V operations.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Outcome, Task, UnavailableError, dpo_loss
from benchmarks.gpu_table import first_line, place
from benchmarks.inputs import HeadInputs
from benchmarks.tasks import GRADIENTS, LOGPS, LOSS


class Reference(NamedTuple):
    """float64 values of the same inputs; gradients where the task has them."""

    logps_N: Tensor
    logps_S: Tensor
    dX_ND: Tensor | None
    dW_VD: Tensor | None


def make_task(name: str, inputs: HeadInputs, *, seed: int = 1) -> Task:
    """Add what the task needs to its inputs: reference log-probs, upstream gradients."""
    N = inputs.shape.T
    ref_logps_N = _blocks(inputs.ref_hidden_ND, inputs, None, want_weight=False)[0]
    generator = torch.Generator().manual_seed(seed)
    upstream_N = torch.randn(N, generator=generator).to(inputs.hidden_ND.device)
    return Task(name, inputs, ref_logps_N.view(-1, inputs.length).sum(1).float(), upstream_N)


def float64_reference(task: Task, *, has_reference: bool = True) -> Reference:
    """The definition, in float64 and blocks of rows: independent of everything that is measured."""
    inputs = task.inputs
    logps_N = _blocks(inputs.hidden_ND, inputs, None, want_weight=False)[0]
    logps_S = logps_N.view(-1, inputs.length).sum(1)
    if task.name == LOGPS:
        return Reference(logps_N, logps_S, None, None)
    if task.name == GRADIENTS:
        upstream_N = task.upstream_N.double()
    else:
        leaf_S = logps_S.clone().requires_grad_()
        ref_logps_S = task.ref_logps_S.double() if has_reference else torch.zeros_like(leaf_S)
        (slopes_S,) = torch.autograd.grad(dpo_loss(leaf_S, ref_logps_S), leaf_S)
        upstream_N = slopes_S.repeat_interleave(inputs.length)
    _, dX, dW = _blocks(inputs.hidden_ND, inputs, upstream_N, want_weight=task.name in (LOSS, GRADIENTS))
    return Reference(logps_N, logps_S, dX, dW)


def _blocks(
    hidden_ND: Tensor, inputs: HeadInputs, upstream_N: Tensor | None, *, want_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs; with an upstream gradient also dX and, if wanted, dW, in the rows' own block each."""
    weight = inputs.weight_VD.double()
    N, _, V = inputs.shape
    rows_at_once = max(1, 2**30 // (8 * V)) if hidden_ND.is_cuda else max(1, 2**26 // (8 * V))
    logps, dX = [], []
    dW = torch.zeros_like(weight) if want_weight else None
    for start in range(0, N, rows_at_once):
        rows = slice(start, start + rows_at_once)
        x_nD, labels = hidden_ND[rows].double(), inputs.labels_N[rows, None]
        logp_nV = (x_nD @ weight.T).log_softmax(dim=1)
        logps.append(logp_nV.gather(1, labels).squeeze(1))
        if upstream_N is None:
            continue
        # d logp[label] / d logits = onehot - p
        gradient_nV = logp_nV.exp_().neg_()
        gradient_nV.scatter_add_(1, labels, torch.ones_like(labels, dtype=gradient_nV.dtype))
        gradient_nV *= upstream_N[rows, None]
        dX.append(gradient_nV @ weight)
        if dW is not None:
            dW.addmm_(gradient_nV.T, x_nD)
    return torch.cat(logps), torch.cat(dX) if dX else None, dW


class Errors(NamedTuple):
    token: float | None
    response: float | None
    dX: float | None
    dW: float | None


def errors(outcome: Outcome, reference: Reference, length: int) -> Errors:
    """See ``LEGEND``. None where the contender returns no such value."""
    token, logps_S = None, outcome.logps_S
    if outcome.logps_N is not None:
        token = _largest(outcome.logps_N, reference.logps_N)
        logps_S = outcome.logps_N.double().view(-1, length).sum(1)
    response = None if logps_S is None else _largest(logps_S, reference.logps_S)
    return Errors(token, response, _relative(outcome.dX_ND, reference.dX_ND), _relative(outcome.dW_VD, reference.dW_VD))


def _largest(value: Tensor, expected: Tensor) -> float:
    return (value.detach().double() - expected).abs().max().item()


def _relative(value: Tensor | None, expected: Tensor | None) -> float | None:
    if value is None or expected is None:
        return None
    # In blocks: a float64 copy of dW and their difference would be a dozen gigabytes.
    value = value.reshape(expected.shape)
    squares = [(v.double() - e).square().sum() for v, e in zip(value.split(8192), expected.split(8192), strict=True)]
    return (torch.stack(squares).sum().sqrt() / expected.norm()).item()


def peak_extra_bytes(run: Callable[[], Outcome], device: torch.device) -> tuple[Outcome, int]:
    """Run once; most memory that torch's allocator held beyond what was there before and the results.

    On the CPU every allocation and release is read from torch's profiler. What a library takes past torch's allocator
    (packed operands of a matrix product) is in neither.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        outcome = run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            outcome = run()
        recorded = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        events = [e for e in recorded if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    results = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outcome if t is not None}
    return outcome, max(0, peak - sum(results.values()))


LAUNCH_CYCLES = 6_000_000
"""Some 3 ms: launching what is measured takes a host 0.1 to 2."""


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one run; on a GPU the device's own, by events, without the host's time to launch it."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # While the device sleeps the host runs ahead, as it does in training.
    torch.cuda._sleep(LAUNCH_CYCLES)
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


@dataclass
class Entry:
    """One contender in a race."""

    contender: Contender
    run: Callable[[], Outcome] | None = None
    extra_bytes: int = 0
    errors: Errors | None = None
    times: list[float] = field(default_factory=list)
    obstacle: str | None = None
    where: str = ""
    """Where it failed."""
    remark: str = ""


class BareProducts:
    """The floor: the head's products alone, into memory that is there, with a real softmax gradient as operand."""

    def __init__(self, inputs: HeadInputs):
        hidden, weight = inputs.hidden_ND, inputs.weight_VD
        logits_NV = hidden @ weight.T
        gradient_NV = torch.empty_like(logits_NV)
        for rows in torch.arange(inputs.shape.T, device=hidden.device).split(512):
            gradient_NV[rows] = logits_NV[rows].float().softmax(dim=1).neg_().to(hidden.dtype)
        dX_ND, dW_VD = torch.empty_like(hidden), torch.empty_like(weight)
        self.runs = {
            "logits": lambda: torch.mm(hidden, weight.T, out=logits_NV),
            "dX": lambda: torch.mm(gradient_NV, weight, out=dX_ND),
            "dW": lambda: torch.mm(gradient_NV.T, hidden, out=dW_VD),
        }
        self.times: dict[str, list[float]] = {name: [] for name in self.runs}

    def floor(self, products: int) -> float:
        """Milliseconds of 1 (logits), 2 (and dX), 3 (and dW) or 4 (logits twice) products."""
        median = {name: statistics.median(times) for name, times in self.times.items()}
        parts = ("logits", "dX", "dW", "logits")[:products]
        return sum(median[part] for part in parts)


class Race:
    """Contenders on one set of inputs, timed in rounds: each runs once a round, in an order that rotates."""

    def __init__(self, inputs: HeadInputs, entrants: Mapping[str, Sequence[Contender]]):
        """``entrants``: contenders of each task."""
        self.inputs = inputs
        self.device = inputs.hidden_ND.device
        self.products = BareProducts(inputs)
        task = make_task(next(iter(entrants)), inputs)
        self.tasks = {name: task._replace(name=name) for name in entrants}
        self.entries = {name: [Entry(contender) for contender in found] for name, found in entrants.items()}
        self._rounds = 0
        self._references: dict[str, dict[bool, Reference]] = {}

    def warm_up(self) -> None:
        """Run everyone once: memory, errors, and whatever happens on a first call.

        A peer that fails becomes a row that says so; of ours, the first failure is raised when all have had their turn.
        """
        failed = [self.first_run(name, entry) for name, entries in self.entries.items() for entry in entries]
        for run in self.products.runs.values():
            run()
        for error in filter(None, failed):
            raise error

    def first_run(self, name: str, entry: Entry) -> Exception | None:
        """Run one entry of a task for the first time; returns the failure of one of ours."""
        task, contender = self.tasks[name], entry.contender
        references = self._references.setdefault(name, {})
        try:
            run = contender.prepare(task)
            # Compilation and the libraries' workspaces take memory of their own: only a second run is looked at.
            if contender.compiles or self.device.type == "cuda":
                run()
            outcome, entry.extra_bytes = peak_extra_bytes(run, self.device)
        except UnavailableError as reason:
            entry.obstacle = str(reason)
            return None
        except Exception as error:
            entry.obstacle = f"failed: {type(error).__name__}: {first_line(error)}"
            entry.where = place(error)
            return error if contender.ours else None
        if contender.has_reference not in references:
            references[contender.has_reference] = float64_reference(task, has_reference=contender.has_reference)
        entry.errors = errors(outcome, references[contender.has_reference], self.inputs.length)
        entry.remark = contender.measure(task) if contender.measure else ""
        entry.run = run
        return None

    def round(self) -> None:
        """Time everyone once more, bare products among them."""
        runs: list[tuple[list[float], Callable[[], Any]]]
        runs = [(self.products.times[name], run) for name, run in self.products.runs.items()]
        runs += [(e.times, e.run) for entries in self.entries.values() for e in entries if e.run is not None]
        first = self._rounds * 7 % len(runs)
        for times, run in runs[first:] + runs[:first]:
            times.append(milliseconds(run, self.device))
        self._rounds += 1

    def rows(self) -> list[dict[str, Any]]:
        """One row per floor and contender, for a table with ``COLUMNS``."""
        rows = []
        for name, entries in self.entries.items():
            products = {e.contender.products for e in entries if e.contender.ours}
            rows += [self._floor_row(name, count) for count in sorted(products)]
            rows += [self.row(name, entry) for entry in entries]
        return rows

    def _floor_row(self, task: str, products: int) -> dict[str, Any]:
        ms = self.products.floor(products)
        row = {"task": task, "contender": f"bare products: {products}", "G": products, "ms": ms, "x own floor": 1.0}
        return {**row, "x 3G floor": ms / self.products.floor(3), "extra MiB": 0.0, "note": "the floor"}

    def row(self, task: str, entry: Entry) -> dict[str, Any]:
        contender = entry.contender
        row: dict[str, Any] = {"task": task, "contender": contender.name, "G": contender.products}
        if not entry.times:
            return {**row, "note": f"not run: {entry.obstacle}"} | ({"where": entry.where} if entry.where else {})
        assert entry.errors is not None
        ms = statistics.median(entry.times)
        row |= {
            "ms": ms,
            "x own floor": ms / self.products.floor(contender.products),
            "x 3G floor": ms / self.products.floor(3),
            "extra MiB": entry.extra_bytes / 2**20,
        }
        named = zip(("token error", "response error", "dX error", "dW error"), entry.errors, strict=True)
        row |= {column: value for column, value in named if value is not None}
        note = "; ".join(part for part in (entry.remark, contender.note) if part)
        return {**row, "note": note, "ours": contender.ours, "times_ms": entry.times}
