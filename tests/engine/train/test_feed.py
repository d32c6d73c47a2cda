from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config.schema import DataConfig, ModelConfig, PackingConfig, RunConfig, TrainConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.packing import mixer_padding_words, summarize_plan
from engine.packing.rows import plan_rows
from engine.train.feed import TrainingFeed
from engine.train.references import ReferenceTable
from engine.train.throughput import FlopModel

FLOPS = FlopModel(10.0, 10.0, 5, True, 4)


def dataset(count: int = 10, seed: int = 0) -> PreferenceDataset:
    generator = np.random.default_rng(seed)

    def draw(low: int, high: int) -> np.ndarray:
        return generator.integers(0, 50, generator.integers(low, high), dtype=np.int32)

    return PreferenceDataset([PreferenceGroup(10 + i, draw(3, 9), (draw(1, 9), draw(1, 9))) for i in range(count)])


def feed(
    data: PreferenceDataset, *, pairs_per_step: int = 4, share: bool = True, table=None, rows_of=None, **train
) -> TrainingFeed:
    return TrainingFeed(
        data,
        PackingConfig(pairs_per_step=pairs_per_step, tokens_per_pack=60, share_prompts=share),
        TrainConfig(**train),
        lookup=None if table is None else table.lookup,
        flops=FLOPS,
        device=torch.device("cpu"),
        **({} if rows_of is None else {"rows_of": rows_of}),
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 3),
        ({"num_train_epochs": 2}, 6),
        ({"num_train_epochs": 1.5}, 5),
        ({"num_train_epochs": 0.1}, 1),
        ({"max_steps": 4, "num_train_epochs": 9}, 4),
    ],
)
def test_number_of_steps(settings, expected):
    run = feed(dataset(), **settings)
    steps = list(run.steps(0))
    assert run.total_steps == len(steps) == expected
    assert [s.number for s in steps] == list(range(1, expected + 1))
    assert [s.epoch for s in steps] == [n / 3 for n in range(1, expected + 1)]


def test_an_epoch_visits_every_row_once_and_the_last_step_holds_the_rest():
    steps = list(feed(dataset(), num_train_epochs=2).steps(0))
    assert [s.num_terms for s in steps] == [4, 4, 2, 4, 4, 2]
    first, second = [sorted(r for s in half for r in s.rows) for half in (steps[:3], steps[3:])]
    assert first == second == list(range(10, 20))
    assert [s.rows for s in steps[:3]] != [s.rows for s in steps[3:]]


def test_a_resumed_feed_goes_on_with_the_same_batches():
    whole = list(feed(dataset(), num_train_epochs=3).steps(0))
    rest = list(feed(dataset(), num_train_epochs=3).steps(5))
    assert [s.number for s in rest] == [6, 7, 8, 9]
    for a, b in zip(whole[5:], rest, strict=True):
        assert a.rows == b.rows
        for p, q in zip(a.packs, b.packs, strict=True):
            assert torch.equal(p.batch.input_ids_T, q.batch.input_ids_T)
    assert list(feed(dataset()).steps(3)) == []


@pytest.mark.parametrize("blocks", ["alike", "alone", "joined"])
def test_what_mixers_compute_of_an_epoch_is_what_its_plan_says(blocks):
    data = dataset(40)
    run = feed(data, rows_of=lambda batch: plan_rows(batch.plan.segments, blocks))
    work = [step.work for step in run.steps(0)]
    model, rows = ModelConfig(model_name_or_path="m"), DataConfig(dataset_name="d")
    plan = summarize_plan(data, RunConfig(model=model, data=rows, packing=run.builder.packing), mixers=blocks)
    assert sum(w.mixer_tokens for w in work) == plan.mixer_tokens == plan.unshared_tokens
    assert sum(w.mixer_cells for w in work) == plan.mixer_cells
    assert (plan.mixer_padding > 0) == (blocks == "alike")
    assert f"of the {plan.mixer_cells:,} tokens" in mixer_padding_words(plan)


def test_each_response_comes_with_its_reference():
    data = dataset()
    table = ReferenceTable([(-1.0 * i, -1.0 * i - 0.5) for i in range(len(data))])
    for step in feed(data, table=table).steps(0):
        for pack in step.packs:
            expected = [v for row in pack.batch.rows for v in (-1.0 * (row - 10), -1.0 * (row - 10) - 0.5)]
            assert pack.ref_logps_S.tolist() == expected
            assert pack.ref_logps_S.dtype == torch.float32


@pytest.mark.parametrize("share", [True, False])
def test_work_counts_tokens_as_they_are(share):
    data = dataset()
    run = feed(data, share=share)
    for step in run.steps(0):
        groups = [data[row - 10] for row in step.rows]
        unshared = sum(len(g.prompt_ids) + len(r) for g in groups for r in g.response_ids)
        shared = sum(len(g.prompt_ids) + sum(len(r) for r in g.response_ids) for g in groups)
        assert step.work.pairs == len(groups)
        assert step.work.unshared_tokens == unshared
        assert step.work.packed_tokens == step.work.rows == (shared if share else unshared)
        assert step.work.flop > 0


def test_digest_follows_tokens_rows_and_boundaries():
    base = feed(dataset()).builder.dataset.digest
    assert feed(dataset(), num_train_epochs=2).builder.dataset.digest == base
    assert feed(dataset(seed=1)).builder.dataset.digest != base
    assert feed(dataset(count=9)).builder.dataset.digest != base
    moved = [
        PreferenceGroup(g.row, g.prompt_ids[:-1], tuple(np.r_[g.prompt_ids[-1:], r] for r in g.response_ids))
        for g in dataset()
    ]
    assert feed(PreferenceDataset(moved)).builder.dataset.digest != base


def test_an_error_in_the_background_reaches_the_caller():
    data = dataset()

    class Broken:
        def lookup(self, pack):
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        list(feed(data, table=Broken()).steps(0))
