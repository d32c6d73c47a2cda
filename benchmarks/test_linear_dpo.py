"""The DPO loss from hidden states, beside everything else that computes it, on the CPU with two threads.

Real hidden states for everyone; random ones for ours, naive logits and the bare products, to show what data changes.
"""

from __future__ import annotations

from benchmarks.contenders import FROZEN, LOSS, contenders
from benchmarks.head_report import race_on, write_race

ROUNDS = 4
RANDOM_ROUNDS = 2


def test_linear_dpo(benchmark):
    real = race_on("real", {task: contenders(task) for task in (LOSS, FROZEN)})
    benchmark.pedantic(real.round, rounds=ROUNDS, iterations=1)
    wanted = ("naive logits", "ours: linear_dpo_loss")
    random = race_on("random", {LOSS: [c for c in contenders(LOSS) if c.name in wanted]})
    for _ in range(RANDOM_ROUNDS):
        random.round()
    result = write_race("linear_dpo", "DPO loss of a language-model head", {"real": real, "random": random})
    benchmark.extra_info.update(result)
    (ours,) = [r for r in result["rows"] if r["contender"] == "ours: linear_dpo_loss" and r["task"] == LOSS]
    assert ours["x own floor"] < 1.5
