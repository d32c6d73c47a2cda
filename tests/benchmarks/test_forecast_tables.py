"""The tables of README.md and docs/experiments.md are what is counted now: an option that saves less fails here."""

from __future__ import annotations

import pytest

from benchmarks import forecast_tables
from benchmarks.forecast_tables import FITS, MODELS, OPTIONS, configs, fits_table, layer_of, run_config, written

MIB, GIB = 2**20, 2**30
FAST = ("8B | `gradient_checkpointing: selective`", "8B | `activation_offload: true`", "8x7B | none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return configs(tmp_path_factory.mktemp("configs") / "models")


def rows():
    """Name, saved MiB, traffic GiB and launches of each row of the table of layers."""
    lines = written("docs/experiments.md")[2:]
    for model, option, saved, traffic, launches in ([c.strip() for c in line.strip("|").split("|")] for line in lines):
        slow = () if f"{model} | {option}" in FAST else (pytest.mark.slow,)
        numbers = (float(saved.replace(",", "")), float(traffic), int(launches))
        yield pytest.param(model, option, numbers, id=f"{model} {option}", marks=slow)


@pytest.mark.parametrize(("model", "option", "budget"), rows())
def test_a_layer_holds_moves_and_launches_no_more(model, option, budget, folders):
    layer = layer_of(run_config(folders[model], **OPTIONS[option]))
    assert layer.saved / MIB <= budget[0] * 1.01 + 1
    assert layer.traffic / GIB <= budget[1] * 1.01 + 0.1
    assert layer.launches <= budget[2]


def test_every_option_of_every_model_has_a_row():
    names = [(row.values[0], row.values[1]) for row in rows()]
    assert names == [(model, option) for model in MODELS if model != "70B" for option in OPTIONS]


def test_saved_bytes_are_those_of_a_block_by_hand(folders):
    """A Llama layer under checkpoints, in numbers of its config; offload leaves nothing but bfloat16 weights."""
    budgets = {row.id: row.values[2][0] for row in rows()}
    T, D, F = forecast_tables.LAYER_TOKENS, 4096, 14336
    # Checkpointed: its input, which the embedding of float32 weights makes float32.
    assert budgets["8B `gradient_checkpointing: true`"] == pytest.approx(T * D * 4 / MIB, rel=0.02)
    # Selective: beside it what q, k, v, o, gate, up and down give, and attention with a float32 of each row and head.
    products = D + 2 * D // 4 + D + 2 * F + D
    kept = T * (D * 4 + 2 * (products + D) + 4 * 32)
    assert budgets["8B `gradient_checkpointing: selective`"] == pytest.approx(kept / MIB, rel=0.02)
    weights = D * (2 * D + 2 * D // 4 + 3 * F)
    assert budgets["8B `activation_offload: true`"] == pytest.approx(2 * weights / MIB, rel=0.05)


def test_what_fits_where_has_all_rows():
    lines = written("README.md")
    assert [line.split("|")[3].strip() for line in lines[2:]] == list(FITS)


@pytest.mark.slow
def test_what_fits_where_is_what_is_forecast(folders):
    assert list(fits_table(folders)) == written("README.md")
