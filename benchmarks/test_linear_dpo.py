"""The DPO loss from hidden states, beside everything else that computes it, on the CPU with two threads.

Real hidden states for everyone; random ones for ours, naive logits and the bare products, to show what data and a
smaller head change.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.contenders import FROZEN, LOSS, contenders_on_cpu
from benchmarks.head_report import Row, race_on, write_race
from benchmarks.shapes import SMALL_CPU_BENCHMARK

ROUNDS = 4
RANDOM_ROUNDS, SMALL_ROUNDS = 2, 8
MOST_FLOOR, MOST_EXTRA = 1.04, 128.0
"""Targets: time over three bare products, and MiB."""


def test_linear_dpo(benchmark):
    # Compiling once is enough: with a frozen head it would take longer than all rounds.
    frozen = [c for c in contenders_on_cpu(FROZEN) if c.name != "torch.compile of naive"]
    real = race_on("real", {LOSS: contenders_on_cpu(LOSS), FROZEN: frozen})
    benchmark.pedantic(real.round, rounds=ROUNDS, iterations=1)
    wanted = ("naive logits", "ours: linear_dpo_loss", "ours: linear_dpo_loss, native")
    few = {LOSS: [c for c in contenders_on_cpu(LOSS) if c.name in wanted]}
    random, small = race_on("random", few), race_on("random", few, SMALL_CPU_BENCHMARK)
    for race, rounds in ((random, RANDOM_ROUNDS), (small, SMALL_ROUNDS)):
        for _ in range(rounds):
            race.round()
    races = {"real": real, "random": random, f"random {SMALL_CPU_BENCHMARK}": small}
    result = write_race("linear_dpo", "DPO loss of a language-model head", races, targets=targets)
    benchmark.extra_info.update(result)


def targets(rows: Sequence[Row]) -> dict[str, str]:
    ours = next(row for row in rows if row["task"] == LOSS and row["contender"] == "ours: linear_dpo_loss")
    floor, extra = ours["x own floor"], ours["extra MiB"]
    return {
        "target, time": f"linear_dpo_loss at most {MOST_FLOOR}x of three bare products: {_verdict(floor, MOST_FLOOR)}",
        "target, memory": f"at most {MOST_EXTRA:g} MiB beyond the results: {_verdict(extra, MOST_EXTRA)}",
    }


def _verdict(value: float, most: float) -> str:
    return f"{value:.4g}, {'met' if value <= most else 'missed'}"
