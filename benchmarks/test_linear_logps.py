"""Per-token log-probs from hidden states, without and with gradients, on the CPU with two threads."""

from __future__ import annotations

from benchmarks.contenders import GRADIENTS, LOGPS, contenders_on_cpu
from benchmarks.head_report import race_on, write_race

ROUNDS = 3
COMPILED = "torch.compile of naive"
"""Measured by the benchmark of the loss; here its compilation would take longer than all rounds."""


def test_linear_logps(benchmark):
    entrants = {task: [c for c in contenders_on_cpu(task) if c.name != COMPILED] for task in (LOGPS, GRADIENTS)}
    race = race_on("real", entrants)
    benchmark.pedantic(race.round, rounds=ROUNDS, iterations=1)
    result = write_race("linear_logps", "Per-token log-probs of a language-model head", {"real": race})
    benchmark.extra_info.update(result)
