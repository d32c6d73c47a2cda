from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, set_seed

from dpo_kernels.chunks import sum_responses
from engine.config.schema import LossConfig
from engine.data import PreferenceDataset, load_dataset_groups
from engine.errors import UserError
from engine.model import load_policy, load_tokenizer
from engine.packing import build_batch
from engine.reference import ReferenceStore, load_ref_sums, model_digest
from engine.train.loop import train
from engine.train.objective import Objective
from engine.train.references import ReferenceTable, check_first_loss, prepare_references, resolve_mode
from tests.engine.train.conftest import assert_same_trajectory

CPU = torch.device("cpu")


@pytest.fixture
def other_model(tiny_model_dir, tmp_path):
    """A model of the same shape with other weights."""
    set_seed(1)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def loaded(make_config):
    config = make_config()
    dataset, _ = load_dataset_groups(config.data, load_tokenizer(config.model), split="train")
    return config, load_policy(config.model, device=CPU), dataset


def test_table_looks_up_groups_of_any_size():
    table = ReferenceTable([(1.0, 2.0), (3.0, 4.0, 5.0), (6.0, 7.0)])
    found = table.lookup((2, 1))
    assert found.tolist() == [6, 7, 3, 4, 5]
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("loss", "mode", "expected"),
    [("sigmoid", "auto", "stored"), ("ipo", "live", "live"), ("orpo", "auto", "none"), ("sft", "none", "none")],
)
def test_auto_follows_the_loss(loss, mode, expected, make_config):
    config = make_config(loss={"loss_type": loss}, reference={"mode": mode})
    assert resolve_mode(config, Objective(config.loss)) == expected


def test_second_run_computes_nothing(loaded):
    config, policy, dataset = loaded
    said: list[str] = []
    objective = Objective(LossConfig())
    for _ in range(2):
        references = prepare_references(config, policy, objective, {"train": dataset}, say=said.append, progress=False)
    assert references.mode == "stored"
    assert said[1] == "reference log-probs (train): 24 rows reused, none computed"


def test_first_loss_is_ln2_and_anything_else_stops(loaded):
    config, policy, dataset = loaded
    prepare_references(config, policy, Objective(LossConfig()), {"train": dataset}, say=lambda text: None)
    sums = load_ref_sums(dataset, ReferenceStore(config.reference.store), model_digest(policy))
    assert check_first_loss(policy, dataset, ReferenceTable(sums), Objective(LossConfig())) == pytest.approx(
        math.log(2), abs=1e-6
    )
    wrong = ReferenceTable([(chosen + 1.0, rejected) for chosen, rejected in sums])
    with pytest.raises(UserError, match=r"start-up check: the sigmoid loss of rows .* is 0\.74.*not ln 2"):
        check_first_loss(policy, dataset, wrong, Objective(LossConfig()))
    not_a_number = ReferenceTable([(math.nan, rejected) for _, rejected in sums])
    with pytest.raises(UserError, match="start-up check"):
        check_first_loss(policy, dataset, not_a_number, Objective(LossConfig()))


def test_another_reference_model_stored_or_live_is_the_same(make_config, rows_of, other_model, tmp_path):
    losses = {}
    for mode in ("auto", "live"):
        config = make_config(
            reference={"mode": mode, "model_name_or_path": str(other_model)},
            train={"output_dir": str(tmp_path / mode)},
        )
        train(config)
        losses[mode] = [row["loss"] for row in rows_of(config)]
    assert losses["auto"] == pytest.approx(losses["live"], abs=1e-5)
    assert losses["auto"][0] != pytest.approx(math.log(2), abs=1e-3)


def test_columns_are_checked_against_the_named_reference_model(loaded, make_config, other_model):
    config, policy, dataset = loaded
    other = load_policy(replace(config.model, model_name_or_path=str(other_model)), device=CPU)
    groups = []
    with torch.no_grad():
        for group in dataset:
            batch = build_batch([group])
            sums = sum_responses(other.logps(batch), batch.lengths_S)
            groups.append(replace(group, ref_logps=tuple(sums.tolist())))
    rows = {"train": PreferenceDataset(groups)}
    objective = Objective(LossConfig())
    named = make_config(reference={"model_name_or_path": str(other_model)})
    assert prepare_references(named, policy, objective, rows, say=print).mode == "stored"
    with pytest.raises(UserError, match="differ from the model's by up to"):
        prepare_references(config, policy, objective, rows, say=print)
    wrong = make_config(reference={"model_name_or_path": config.model.model_name_or_path})
    with pytest.raises(UserError, match="differ from the model's by up to"):
        prepare_references(wrong, policy, objective, rows, say=print)


@pytest.mark.parametrize("columns", [True, False], ids=["columns", "store"])
def test_what_may_differ_is_reward_at_the_beta_of_the_run(columns, loaded, make_config, monkeypatch):
    _, policy, dataset = loaded
    with torch.no_grad():
        batches = [build_batch([group]) for group in dataset]
        sums = [tuple((sum_responses(policy.logps(b), b.lengths_S) + 0.002).tolist()) for b in batches]
    if columns:
        dataset = PreferenceDataset(replace(group, ref_logps=s) for group, s in zip(dataset, sums, strict=True))
    monkeypatch.setattr("engine.train.references.load_ref_sums", lambda *unused: sums)
    for beta, refused in ((0.1, nullcontext()), (10.0, pytest.raises(UserError, match=r"of reward at beta 10 "))):
        config = make_config(loss={"beta": beta})
        with refused:
            prepare_references(config, policy, Objective(config.loss), {"train": dataset}, say=print)


def test_mode_stored_names_the_missing_row(make_config, tmp_path):
    with pytest.raises(UserError, match=r"no reference log-probs for row 0 and 23 more rows.*dpo precompute"):
        train(make_config(reference={"mode": "stored", "store": str(tmp_path / "empty")}))


def test_reference_columns_of_the_data_are_used_and_checked(make_config, rows_of, pairs_jsonl, tmp_path):
    first = make_config(train={"output_dir": str(tmp_path / "first")})
    train(first)
    stored = rows_of(first)
    rows = [json.loads(line) for line in pairs_jsonl.read_text().splitlines()]
    dataset, _ = load_dataset_groups(first.data, load_tokenizer(first.model), split="train")
    digest = model_digest(load_policy(first.model, device=CPU))
    sums = load_ref_sums(dataset, ReferenceStore(first.reference.store), digest)
    data = tmp_path / "columns.jsonl"
    for offset in (0.0, 0.5):
        for row, (chosen, rejected) in zip(rows, sums, strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = chosen + offset, rejected
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = make_config(data={"dataset_name": str(data)}, reference={"store": str(tmp_path / "unused")})
        if offset:
            with pytest.raises(UserError, match=r"differ from the model's by up to"):
                train(make_config(data={"dataset_name": str(data)}, train={"output_dir": str(tmp_path / "wrong")}))
        else:
            train(config)
            assert_same_trajectory(rows_of(config), stored)
            assert not (tmp_path / "unused").exists()


def test_a_reference_moves_by_its_share(loaded, make_config, other_model, caplog):
    _, policy, dataset = loaded
    moves = {"sync_ref_model": True, "model_name_or_path": str(other_model)}
    config = make_config(reference=moves)
    assert resolve_mode(config, Objective(config.loss)) == "live"
    references = prepare_references(config, policy, Objective(config.loss), {"train": dataset}, say=print)
    assert references.source.startswith("live: a second model, moved towards the policy by 0.6 every 512 steps, ")
    before = [p.clone() for p in references.moving.parameters()]
    references.move(policy, 0.3)
    for old, now, new in zip(before, references.moving.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(now.double(), 0.7 * old.double() + 0.3 * new.double(), rtol=1e-6, atol=1e-8)
        assert not now.requires_grad


def test_a_reference_of_another_shape_does_not_move(loaded, make_config, tiny_mixture_dir):
    _, policy, dataset = loaded
    config = make_config(reference={"sync_ref_model": True, "model_name_or_path": str(tiny_mixture_dir)})
    with pytest.raises(UserError, match=r"sync_ref_model mixes weights, and those of reference\.model_name_or_path=.*"):
        prepare_references(config, policy, Objective(config.loss), {"train": dataset}, say=print)
