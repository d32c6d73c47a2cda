"""Time, memory and errors mean what the tables say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import LOGPS, LOSS, Contender, Outcome, UnavailableError, contenders
from benchmarks.inputs import make_inputs
from benchmarks.measure import BareProducts, Race, Reference, errors, peak_extra_bytes
from benchmarks.shapes import HeadShape

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_counts_what_was_held_at_once() -> None:
    """8 MiB held while a result of 2 MiB is made; 4 MiB before that, released in time."""

    def run() -> Outcome:
        first = torch.empty(MIB, dtype=torch.float32)
        del first
        second = torch.empty(2 * MIB, dtype=torch.float32)
        result = torch.empty(MIB // 2, dtype=torch.float32)
        del second
        return Outcome(logps_N=result)

    outcome, extra = peak_extra_bytes(run, CPU)
    assert outcome.logps_N is not None
    assert extra == pytest.approx(8 * MIB, abs=4096)


def test_peak_sees_inside_custom_operators() -> None:
    inputs = make_inputs("random", HeadShape(64, 32, 20000), length=8)
    (ours,) = [c for c in contenders(LOGPS) if c.ours]
    race = Race(inputs, {LOGPS: [ours]})
    race.warm_up()
    race.round()
    (row,) = [r for r in race.rows() if r["contender"] == ours.name]
    assert row["extra MiB"] >= 64 * 20000 * 4 / MIB


def test_errors() -> None:
    exact = Reference(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([3.0, 7.0]).double(), None, None)
    found = errors(Outcome(torch.tensor([1.0, 2.5, 3.0, 4.25])), exact, length=2)
    assert found == (0.5, 0.5, None, None)
    gradient = torch.tensor([[3.0, 4.0]]).double()
    exact = Reference(exact.logps_N, exact.logps_S, gradient, gradient)
    found = errors(Outcome(None, torch.tensor([3.0, 8.0]), gradient, 1.1 * gradient), exact, length=2)
    assert found == (None, 1.0, 0.0, pytest.approx(0.1))


def test_floor_by_number_of_products() -> None:
    products = BareProducts(make_inputs("random", HeadShape(8, 4, 16), length=2))
    products.times = {"logits": [1.0, 2.0, 30.0], "dX": [3.0], "dW": [5.0]}
    assert [products.floor(count) for count in (1, 2, 3, 4)] == [2.0, 5.0, 10.0, 12.0]
    for run in products.runs.values():
        run()


def test_race_keeps_going_without_a_peer() -> None:
    """A peer that cannot run, or fails, is a row that says why; ours must not fail."""

    def absent(task):
        raise UnavailableError("needs a moon base")

    def broken(task):
        raise ZeroDivisionError("on purpose")

    inputs = make_inputs("random", HeadShape(8, 4, 16), length=2)
    naive = contenders(LOSS)[0]
    race = Race(inputs, {LOSS: [Contender("absent", 3, absent), Contender("broken", 3, broken), naive]})
    race.warm_up()
    for _ in range(3):
        race.round()
    rows = {row["contender"]: row for row in race.rows()}
    assert rows["absent"]["note"] == "not run: needs a moon base"
    assert rows["broken"]["note"] == "not run: failed: ZeroDivisionError: on purpose"
    assert len(rows[naive.name]["times_ms"]) == 3
    with pytest.raises(ZeroDivisionError):
        Race(inputs, {LOSS: [Contender("ours", 3, broken, ours=True)]}).warm_up()
