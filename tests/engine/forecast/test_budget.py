"""The largest budget of tokens that fits: it does, and the next one does not."""

from __future__ import annotations

import pytest

from engine.forecast import Target, budget
from engine.forecast.budget import UNIT, largest_budget
from engine.forecast.memory import Memory
from engine.model.policy import Layout
from engine.packing import plan_first_epoch
from tests.engine.forecast.large import pairs, run_config

ABSENT = Target.of_kind("cuda", 1)
CASES = {"a line": lambda tokens: 900 * tokens, "steps": lambda tokens: 2**26 + 700 * tokens + 2**24 * (tokens // 5000)}


@pytest.fixture(params=CASES)
def search(request, tmp_path, monkeypatch):
    """Bytes of a device by tokens, and the search, over forecasts that cost nothing."""
    asked = []

    def forecast(config, groups, *, several, **options):
        tokens = sum(len(g.prompt_ids) + sum(map(len, g.response_ids)) for g in groups)
        asked.append((tokens, several))
        return Memory(*[0] * 5, step_peak=CASES[request.param](tokens), process=0, pack_tokens=tokens)

    monkeypatch.setattr(budget, "forecast_pack", forecast)
    monkeypatch.setattr(budget, "layers_that_repeat", lambda config, target: (1, 8))
    config, dataset = run_config(tmp_path), pairs(300, prompt=128, response=64)
    steps = plan_first_epoch(dataset, config)
    options = {"target": ABSENT, "resident": 0, "layout": Layout()}
    needed = lambda tokens: ABSENT.needed(CASES[request.param](tokens))  # noqa: E731
    return lambda room: largest_budget(config, dataset, steps, room=room, **options), needed, asked


@pytest.mark.parametrize("tokens", [512, 4864, 9984, 16128])
def test_it_is_the_largest(search, tokens):
    find, needed, asked = search
    found = find(needed(tokens) + 100)
    assert (found.tokens, found.whole_step) == (tokens, False)
    assert found.memory.pack_tokens == tokens
    # Of a step's groups: more packs have gradients of earlier ones.
    assert all(several == (size < 64 * 256) for size, several in asked)
    assert len(asked) < 12


def test_all_of_a_step_or_nothing(search):
    find, needed, _ = search
    whole = find(2**40)
    assert (whole.whole_step, whole.tokens) == (True, 64 * 256)
    assert find(needed(256) - 1).tokens == 0
    assert find(needed(256) + UNIT).tokens == 256
