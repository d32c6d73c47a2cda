"""Whole runs on rows that are each desirable or not: KTO and APO-zero of unpaired rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from engine.check import check
from engine.config.schema import LossConfig
from engine.data import load_dataset_groups
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.packing import plan_first_epoch
from engine.precompute import check_settings, fill_store
from engine.reference import ReferenceStore
from engine.train.loop import train
from engine.train.mismatched import loss_groups, step_order, with_mismatched
from engine.train.terms import LossTerms
from tests.engine.conftest import preference_rows
from tests.engine.train.conftest import TRAJECTORY, assert_same_trajectory

NAMES = (*TRAJECTORY, "kl", "rewards/accuracies", "count/chosen", "count/rejected")


@pytest.fixture
def rows_file(tmp_path):
    """24 rows, of which a third are undesirable, over 4 steps; the last 6 of them are a second set, too."""
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 else "chosen"], "label": i % 3 != 1}
        for i, row in enumerate(preference_rows(24))
    ]
    for name, part in (("rows", rows), ("held-out", rows[18:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def config_of(make_config, rows_file, tmp_path):
    def make(name="run", **sections):
        data = {"dataset_name": str(rows_file), **sections.pop("data", {})}
        loss = {"loss_type": "kto", "desirable_weight": 0.8, **sections.pop("loss", {})}
        output = {"output_dir": str(tmp_path / name), **sections.pop("train", {})}
        return make_config(data=data, loss=loss, train=output, **sections)

    return make


def groups_of(config, split="train"):
    from engine.model import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    dataset, _ = load_dataset_groups(config.data, tokenizer, split=split, unpair=True)
    return loss_groups(config, dataset, split=split)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_do_not_depend_on_packs(dtype, config_of, rows_of, rows_file):
    """Nor on where references come from."""
    held_out = {"eval_dataset_name": str(rows_file.with_name("held-out.jsonl"))}
    runs = []
    for name, packing, mode in (("one", 100_000, "auto"), ("many", 200, "auto"), ("live", 500, "live")):
        config = config_of(
            name,
            model={"dtype": dtype},
            data=held_out,
            packing={"tokens_per_pack": packing},
            reference={"mode": mode},
            train={"eval_steps": 4},
        )
        result = train(config)
        runs.append((rows_of(config), result.metrics))
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for rows, metrics in runs[1:]:
        assert_same_trajectory(rows, runs[0][0], tolerance, names=NAMES if dtype == "float32" else ("loss", "kl"))
        for name in ("eval_loss", "eval_kl", "eval_rewards/chosen", "eval_rewards/rejected"):
            assert metrics[name] == pytest.approx(runs[0][1][name], rel=tolerance, abs=tolerance), name
    rows, metrics = runs[0]
    # At first policy and reference are one.
    assert rows[0]["loss"] == pytest.approx(0.5 * np.mean([0.8] * 4 + [1] * 2), abs=2e-2)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4 if dtype == "float32" else 0.5)
    assert max(row["kl"] for row in rows) > 0.05
    assert (metrics["eval_count/chosen"], metrics["eval_count/rejected"]) == (4, 2)
    assert "eval_ranking_accuracy" not in metrics


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_completions_of_a_step_are_exchanged_in_it(shuffle, config_of):
    config = config_of(packing={"shuffle": shuffle, "pairs_per_step": 5})
    dataset = groups_of(config)
    steps = plan_first_epoch(dataset, config)
    assert [sum(map(len, step)) for step in steps] == [5, 5, 5, 5, 4]
    for step in steps:
        members = [dataset[i] for pack in step for i in pack]
        own, other = ([g.response_ids[k].tobytes() for g in members] for k in (0, 1))
        assert sorted(own) == sorted(other)
        assert all(a != b for a, b in zip(own, other, strict=True))
    if not shuffle:
        # As TRL rolls a batch.
        turned = [dataset[i - 1 if i % 5 else min(i + 4, 23)] for i in range(24)]
        assert all(
            g.response_ids[1].tolist() == t.response_ids[0].tolist() for g, t in zip(dataset, turned, strict=True)
        )
    # An evaluation is one block, whatever the steps.
    held_out = groups_of(replace(config, data=replace(config.data, eval_dataset_name=config.data.dataset_name)), "eval")
    assert [g.response_ids[1].tolist() for g in held_out] == [
        held_out[i - 1].response_ids[0].tolist() for i in range(24)
    ]


def test_a_completion_is_cut_behind_its_new_prompt():
    def group(row, prompt, response, cut):
        ids = [np.arange(start, start + size, dtype=np.int32) for start, size in ((0, prompt), (10, response))]
        rest = (np.arange(10 + response, 10 + response + cut, dtype=np.int32),)
        return PreferenceGroup(row, ids[0], (ids[1],), desirable=True, cut=rest)

    # Of at most 10 tokens; 9 are the most that a response has.
    dataset = PreferenceDataset([group(0, 7, 3, 6), group(1, 2, 5, 0), group(2, 4, 6, 3)])
    found = with_mismatched(dataset, np.array([2, 0, 1]), 3, 10)
    assert [len(g.response_ids[1]) for g in found] == [3, 8, 5]
    assert found[1].response_ids[1].tolist() == list(range(10, 18))
    assert [g.cut for g in found] == [None] * 3
    blocks = with_mismatched(dataset, np.array([2, 0, 1]), 2, None)
    assert [len(g.response_ids[1]) for g in blocks] == [9, 5, 9]
    assert found.digest != blocks.digest != dataset.digest


def test_rows_of_a_mixture_are_compared_within_their_step():
    """Where a row comes twice, and some do not come in the first epoch."""
    ids = [np.array([place], np.int32) for place in range(12)]
    dataset = PreferenceDataset(PreferenceGroup(n, ids[0], (ids[n],), desirable=True) for n in range(12))
    order = step_order(np.array([0, 1, 2, 3, 0, 4, 5, 6, 7, 8]), 12, 4)
    found = [int(group.response_ids[1][0]) for group in with_mismatched(dataset, order, 4, None)]
    assert found == [3, 0, 1, 2, 0, 4, 5, 8, 7, 11, 9, 10]


def test_references_are_stored_for_both_completions(config_of, tmp_path):
    config = config_of(reference={"store": str(tmp_path / "own")})
    fill_store(config)
    dataset = groups_of(config)
    different = {(g.prompt_ids.tobytes(), r.tobytes()) for g in dataset for r in g.response_ids}
    assert len(ReferenceStore(tmp_path / "own")) == len(different) == 48
    train(replace(config, reference=replace(config.reference, mode="stored")))
    # Without the divergence a row has its own alone.
    unpaired = config_of("apo", loss={"loss_type": "apo_zero_unpaired"}, reference={"store": str(tmp_path / "apo")})
    train(unpaired)
    assert len(ReferenceStore(tmp_path / "apo")) == 24


def test_a_mixture_of_pairs_and_rows(config_of, rows_file, pairs_jsonl, rows_of):
    sets = [
        {"name": str(rows_file), "fraction": 0.5, "label": "rows", "split": "train[25%:]", "eval_split": "train[:25%]"},
        {"name": str(pairs_jsonl), "rows": 12, "label": "pairs"},
    ]
    data = {"dataset_name": None, "datasets": sets}
    config = config_of(data=data, packing={"pairs_per_step": 7}, train={"max_steps": 4})
    result = train(config)
    for row in rows_of(config):
        own = {name: [row[f"train/{label}/{name}"] for label in ("rows", "pairs")] for name in ("num_pairs", "loss")}
        assert sum(own["num_pairs"]) == 7
        assert np.dot(own["num_pairs"], own["loss"]) / 7 == pytest.approx(row["loss"], rel=1e-5)
        for side in ("chosen", "rejected"):
            assert sum(row[f"train/{label}/count/{side}"] for label in ("rows", "pairs")) == row[f"count/{side}"]
    assert result.metrics["eval/rows/num_pairs"] == 6
    assert "eval/rows/ranking_accuracy" not in result.metrics


REFUSED = {
    "labels for a loss of pairs": (
        {"loss": {"loss_type": "sigmoid", "desirable_weight": 1.0}},
        "row 0 is one completion with a label, and loss.loss_type sigmoid compares completions of one prompt: set "
        "loss.loss_type to kto",
    ),
    "one row a step": ({"packing": {"pairs_per_step": 1}}, "packing.pairs_per_step must be at least 2 for loss.loss_"),
    "weights of sides for pairs": (
        {"loss": {"loss_type": "ipo"}},
        "loss.desirable_weight is for loss_type kto and apo_zero_unpaired; it has no meaning for loss_type ipo",
    ),
    "beside another loss": ({"loss": {"loss_type": ["kto", "sft"]}}, "loss_type kto does not add to others; name it"),
    "no side": (
        {"loss": {"desirable_weight": 0.0, "undesirable_weight": 0.0}},
        "loss.desirable_weight and loss.undesirable_weight are both 0: nothing is left",
    ),
    "a negative weight": ({"loss": {"undesirable_weight": -1.0}}, "loss.undesirable_weight must not be negative"),
    "an option of pairs": (
        {"loss": {"ld_alpha": 0.5}},
        "loss.ld_alpha is for pairs; it has no meaning for loss_type kto",
    ),
    "a pattern": (
        {"data": {"mask_pattern": "the"}},
        "loss.loss_type kto counts every token alike: leave them out with",
    ),
    "no reference": ({"reference": {"mode": "none"}}, "reference.mode none does not fit loss.loss_type kto"),
    "processes on one pack": (
        {"train": {"context_parallel": 2}},
        "train.context_parallel=2 divides packs of pairs and rankings, and loss.loss_type=kto takes unpaired rows: set",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_loss_does_not_take_is_refused(case, config_of):
    sections, message = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(message)):
        train(config_of(**sections))


ROWS = {
    "rankings": (
        {"prompt": "a", "responses": [" b", " c", " d"], "ranking": [1, 2, 3]},
        "row 0 has 3 responses, and loss.loss_type kto takes labelled completions or pairs: set data.scored_pairs to",
    ),
    "several pairs": (
        {"prompt": "a", "responses": [" b", " c", " d"], "scores": [1, 2, 3]},
        "loss.loss_type kto does not take several pairs of one prompt: set data.scored_pairs to best_worst",
    ),
    "a mask": (
        {"prompt": "a", "completion": " b", "label": True, "mask": [1, 0]},
        "rows have a mask or weights of tokens, or data.mask_pattern leaves some out, and loss.loss_type kto counts",
    ),
    "a margin": (
        {"prompt": "a", "chosen": " b", "rejected": " c", "margin": 1.0},
        "rows have a column margin, which has no meaning for loss.loss_type kto",
    ),
    "references of pairs": (
        {"prompt": "a", "chosen": " b", "rejected": " c", "ref_chosen_logps": -1, "ref_rejected_logps": -2},
        "row 0 has a column of reference log-probs, and loss.loss_type kto needs those of other rows' completions, too",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_the_loss_does_not_take_are_refused(case, config_of, tmp_path):
    row, message = ROWS[case]
    path = tmp_path / "refused.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "e"}) + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        groups_of(config_of(data={"dataset_name": str(path)}))


def test_an_export_is_refused(config_of, tmp_path):
    with pytest.raises(
        UserError, match=r"--export writes columns of pairs and rankings, and loss\.loss_type kto takes"
    ):
        check_settings(config_of(), tmp_path / "out.jsonl")


def test_weights_and_references_of_rows(config_of, rows_file, rows_of):
    """A weight multiplies the loss; a column of references is that of the row's own completion."""
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    weighted = rows_file.with_name("weighted.jsonl")
    weighted.write_text("".join(json.dumps(row | {"weight": 0.5}) + "\n" for row in lines))
    losses = []
    for path in (rows_file, weighted):
        config = config_of(path.stem, data={"dataset_name": str(path)}, train={"max_steps": 1})
        train(config)
        losses.append(rows_of(config)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)
    referenced = rows_file.with_name("referenced.jsonl")
    referenced.write_text("".join(json.dumps(row | {"ref_logps": -1.0}) + "\n" for row in lines))
    wrong = config_of("wrong", data={"dataset_name": str(referenced)}, loss={"loss_type": "apo_zero_unpaired"})
    with pytest.raises(UserError, match=r"reference log-probs of rows .* differ from the model's"):
        train(wrong)


def test_a_run_is_evaluated_by_its_loss(config_of, rows_file):
    config = config_of(data={"eval_dataset_name": str(rows_file.with_name("held-out.jsonl"))}, train={"max_steps": 2})
    result = train(config)
    plain = replace(config, loss=type(config.loss)())
    values = evaluate(plain, str(result.output_dir))
    assert values["eval_loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)
    assert values["eval_kl"] == pytest.approx(result.metrics["eval_kl"], rel=1e-3, abs=1e-5)


def test_held_out_rows_of_one_label_are_evaluated_with_samples_beside_the_estimate(config_of, rows_file, caplog):
    rows = [json.loads(line) | {"label": True} for line in rows_file.read_text().splitlines()[:4]]
    path = rows_file.with_name("desirable.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_steps": 2, "eval_steps": 1, "sample_prompts": 2, "sample_max_new_tokens": 4}
    config = config_of(data={"eval_dataset_name": str(path)}, train=options)
    with caplog.at_level("INFO"):
        result = train(config)
        alone, drawn = (evaluate(config, str(result.output_dir), samples=samples) for samples in (0, 2))
    assert f"step 2  eval loss {result.metrics['eval_loss']:.4f}  accuracy" in caplog.text
    assert re.search(r"\ncount/chosen +4\n", caplog.text)
    assert {name: drawn[name] for name in alone} == alone
    assert drawn["eval_sampled/kl_k3"] > 0


@pytest.mark.parametrize(("counts", "weights"), [((30, 10), (1.0, 1.0)), ((10, 30), (1.0, 2.0)), ((7, 9), (2.0, 0.1))])
def test_labels_that_do_not_weigh_evenly_are_warned_of_as_trl_does(counts, weights):
    terms = LossTerms(LossConfig(loss_type="kto", desirable_weight=weights[0], undesirable_weight=weights[1]))
    words = terms.uneven(*counts)
    good, bad = re.findall(r"weight to ([\d.]+) to ([\d.]+)", words)
    # What is advised is even.
    for end in map(float, good):
        ratio = counts[0] * end / (counts[1] * weights[1])
        assert 0.99 <= ratio <= 1.34
    for end in map(float, bad):
        ratio = counts[0] * weights[0] / (counts[1] * end)
        assert 0.99 <= ratio <= 1.34
    assert terms.uneven(counts[0], counts[0]) is None
    assert LossTerms(LossConfig(loss_type="kto", desirable_weight=0.4)).uneven(30, 10) is None
    assert LossTerms(LossConfig()).uneven(*counts) is None


def test_check_says_what_training_will_make_of_rows(config_of, rows_file, pairs_jsonl):
    found = check(config_of())
    assert not found.obstacles
    assert re.search(r"desirable +\d.*\n +undesirable +\d", found.text)
    assert "warning: 16 desirable rows weigh 1.6 times as much as 8 undesirable ones" in found.text
    pairs = check(config_of(data={"dataset_name": str(pairs_jsonl)}))
    assert "each pair becomes two rows: the chosen response is desirable" in pairs.text
    assert not pairs.obstacles
    others = check(config_of(loss={"loss_type": "sigmoid", "desirable_weight": 1.0}))
    assert others.reports["train"].counts == {"unpaired": 24}
    assert "24 of 24 rows cannot be used (unpaired)" in others.obstacles[0]
    masked = check(config_of(data={"mask_pattern": "the"}))
    assert "loss.loss_type kto counts every token alike" in masked.obstacles[0]
