"""Several evaluation sets, the best checkpoint and early stopping: as transformers decides, exact under resume."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import SaveStrategy

from engine.digits import figures
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.report import write_report
from engine.run_folder import eval_prefixes, tokens_of
from engine.train import run as run_module
from engine.train.best import Best, check_metric
from engine.train.checkpoint import REFERENCE_FILE, complete_checkpoints
from engine.train.loop import train
from tests.engine.train.conftest import read_rows
from tests.engine.train.test_resume import interrupted_after, run_files

COMPARED = {"eval_steps": 2, "save_steps": 2, "num_train_epochs": 3, "load_best_model_at_end": True}
LOSSES = {2: 0.60, 4: 0.50, 6: 0.55, 8: 0.56, 10: 0.4, 12: 0.3}
"""What evaluations are made to find, by step: with a patience of two, a run ends at step 8 and its best is step 4."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory, pairs_jsonl):
    """Two evaluation sets of five and three rows."""
    folder = tmp_path_factory.mktemp("sets")
    rows = pairs_jsonl.read_text().splitlines(keepends=True)
    paths = {"safety": folder / "safety.jsonl", "style_2": folder / "style.jsonl"}
    for path, part in zip(paths.values(), (rows[:5], rows[5:8]), strict=True):
        path.write_text("".join(part))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def compared(make_config, sets):
    """``compared(folder, section={...})``: a run of twelve steps whose evaluations are compared."""

    def make(folder, train=(), **sections):
        data = {"eval_dataset_name": sets["safety"]}
        output = {"output_dir": str(folder), "early_stopping_patience": 2, "save_total_limit": 1}
        return make_config(data=data, train=COMPARED | output | dict(train), **sections)

    return make


@pytest.fixture
def planned(monkeypatch):
    """Evaluations find ``LOSSES``."""
    inner = run_module.evaluate_splits

    def evaluated(policy, datasets, objective, config, **options):
        values = inner(policy, datasets, objective, config, **options)
        return values | {"eval_loss": LOSSES[running[-1].done]}

    running = []
    start = run_module.Run.__init__
    monkeypatch.setattr(run_module.Run, "__init__", lambda run, *a, **k: (running.append(run), start(run, *a, **k))[1])
    monkeypatch.setattr(run_module, "evaluate_splits", evaluated)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("greater", [None, True, False])
def test_evaluations_are_compared_as_transformers_does(threshold, greater, make_config, sets):
    options = {"early_stopping_threshold": threshold, "greater_is_better": greater, "early_stopping_patience": 3}
    config = make_config(
        data={"eval_dataset_name": sets["safety"]},
        train={"eval_steps": 1, "metric_for_best_model": "rewards/margins", **options},
    )
    name = "eval_rewards/margins"
    args = SimpleNamespace(
        greater_is_better=greater is not False, metric_for_best_model=name, save_strategy=SaveStrategy.STEPS
    )
    state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=0)
    for seed in range(20):
        ours, theirs = Best(config), EarlyStoppingCallback(3, threshold)
        control, state.best_metric = SimpleNamespace(should_training_stop=False), None
        for step, value in enumerate(np.random.default_rng(seed).normal(size=12).round(1).tolist(), start=1):
            metrics = {name: value}
            theirs.on_evaluate(args, state, control, metrics)
            Trainer._determine_best_metric(SimpleNamespace(args=args, state=state), metrics, None)
            ours.evaluated(metrics, step=step, saved=True)
            assert (ours.value, ours.waited) == (state.best_metric, theirs.early_stopping_patience_counter)
            assert ours.ends_run == (theirs.early_stopping_patience_counter >= 3)
            assert (f"by more than {threshold:g} in" in ours.words) == (threshold > 0)
            restored = Best(config)
            restored.load(json.loads(json.dumps(ours.state())))
            assert vars(restored) == vars(ours)


@pytest.mark.parametrize("model", [{}, {"lora": {"r": 4}}], ids=["whole", "lora"])
def test_a_run_ends_early_and_leaves_its_best(model, compared, planned, tmp_path, caplog):
    with caplog.at_level("INFO"):
        result = train(compared(tmp_path / "run", model=model))
    run = tmp_path / "run"
    assert result.steps == 8
    assert "eval_loss was not better than 0.5000 in 2 evaluations in a row" in caplog.text
    # The best stays though only one is kept; the newest is what the run can be extended from.
    assert [step for step, _ in complete_checkpoints(run)] == [4, 8]
    (name,) = (path.name for path in run.glob("*.safetensors"))
    best, final = load_file(run / "checkpoint-4" / name), load_file(run / name)
    assert all((final[key] == best[key]).all() for key in best)
    assert not all((final[key] == tensor).all() for key, tensor in load_file(run / "checkpoint-8" / name).items())
    assert result.metrics["eval_loss"] == json.loads((run / "evaluation.json").read_text())["eval_loss"] == 0.5
    assert "step 4 of 8, the best by eval_loss (0.5000)" in (run / "README.md").read_text()
    assert [row["step"] for row in read_rows(run) if "loss" in row] == list(range(1, 9))
    # Finished: with the same patience nothing is left, with more the run goes on where it ended.
    assert train(compared(run, model=model), resume=True).steps == 8
    written = [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(run.iterdir())]
    with caplog.at_level("INFO"):
        assert train(compared(run, {"max_steps": 20}, model=model), resume=True).steps == 8
    assert "more steps alone change nothing, a larger train.early_stopping_patience goes on" in caplog.text
    assert [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(run.iterdir())] == written
    longer = train(compared(run, {"early_stopping_patience": 3}, model=model), resume=True)
    assert (longer.resumed_from, longer.steps) == (8, 12)
    assert longer.metrics["eval_loss"] == 0.3


@pytest.mark.parametrize("rows", [3, 8, 12], ids="after {} rows".format)
def test_an_interrupted_run_ends_where_another_does(rows, compared, planned, tmp_path, monkeypatch):
    """Before and after evaluations, and after the last one, which ends the run."""
    train(compared(tmp_path / "whole"))
    config = compared(tmp_path / "stopped")
    with interrupted_after(monkeypatch, rows=rows), pytest.raises(KeyboardInterrupt):
        train(config)
    assert train(config, resume=True).steps == 8
    assert run_files(tmp_path / "stopped") == run_files(tmp_path / "whole")
    names = [sorted(p.name for p in (tmp_path / run).glob("checkpoint-*")) for run in ("stopped", "whole")]
    assert names[0] == names[1]


def test_the_evaluation_that_ends_a_run_may_be_its_best(make_config, sets):
    """Better by less than the threshold: not enough to go on for, and its checkpoint, the run's last, is the best."""
    options = {**COMPARED, "eval_steps": 1, "early_stopping_patience": 1, "early_stopping_threshold": 0.1}
    best = Best(make_config(data={"eval_dataset_name": sets["safety"]}, train=options))
    best.evaluated({"eval_loss": 0.5}, step=2, saved=True)
    best.evaluated({"eval_loss": 0.45}, step=3, saved=False)
    assert best.ends_run
    assert best.kept is not None
    assert best.kept.step == 3


def test_a_run_that_compares_from_a_resume_on_says_so(compared, planned, tmp_path, monkeypatch, caplog):
    plain = {"load_best_model_at_end": False, "early_stopping_patience": None, "save_total_limit": None}
    with interrupted_after(monkeypatch, rows=8), pytest.raises(KeyboardInterrupt):
        train(compared(tmp_path / "run", plain))
    assert train(compared(tmp_path / "run"), resume=True).metrics["eval_loss"] == LOSSES[12]
    assert "evaluations before this resume were not compared" in caplog.text


def test_the_best_comes_with_the_reference_that_it_had(compared, planned, tmp_path, monkeypatch):
    """What is measured of its weights is measured against that one."""
    measured = []

    def noted(setup, evaluation):
        model = setup.references.moving.model
        measured.append({name: tensor.clone() for name, tensor in model.named_parameters()})

    monkeypatch.setattr(run_module, "round_and_measure", noted)
    moved = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    assert train(compared(tmp_path / "run", reference=moved)).steps == 8
    saved = load_file(tmp_path / "run" / "checkpoint-4" / REFERENCE_FILE)
    assert all((measured[0][name] == tensor).all() for name, tensor in saved.items())


def test_every_set_has_its_metrics(make_config, sets, tmp_path, caplog):
    train_options = {"eval_steps": 2, "metric_for_best_model": "style_2_loss"}
    config = make_config(data={"eval_dataset_name": sets}, train=train_options)
    with caplog.at_level("INFO"):
        result = train(config)
    page = write_report(tmp_path / "run").read_text().replace("<wbr>", "")
    together = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluate(config, str(tmp_path / "run")) == pytest.approx(together, rel=1e-5, abs=1e-5)
    assert eval_prefixes(together) == ["eval_safety_", "eval_style_2_"]
    for name, path in sets.items():
        alone = evaluate(make_config(data={"eval_dataset_name": path}), str(tmp_path / "run"))
        own = {key.removeprefix(f"eval_{name}_"): v for key, v in together.items() if key.startswith(f"eval_{name}_")}
        assert own == pytest.approx({key.removeprefix("eval_"): v for key, v in alone.items()}, rel=1e-5, abs=1e-5)
        assert f"eval {name} loss {figures(own)['loss']}".replace("\u00a0", " ") in caplog.text
        assert result.metrics[f"eval_{name}_loss"] == own["loss"]
        assert f"data (eval_{name})" in caplog.text
    assert [row["step"] for row in read_rows(tmp_path / "run") if "eval_safety_loss" in row] == [2, 4]
    assert {tokens_of(key) is None for key in read_rows(tmp_path / "run")[-1]} == {True}
    for words in ("safety_loss", "style_2 loss (nats)", "eval_style_2", "safety 33-64"):
        assert words in page


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            {},
            {"early_stopping_patience": 2},
            r"train\.early_stopping_patience compares evaluations: set train\.eval_st",
        ),
        (
            {},
            {"eval_steps": 2, "early_stopping_patience": 0},
            r"early_stopping_patience must be positive or null, got 0",
        ),
        ({}, {"eval_steps": 2, "early_stopping_threshold": -1}, r"threshold must not be negative, got -1"),
        ({}, {"load_best_model_at_end": True}, r"train\.load_best_model_at_end compares evaluations"),
        ({}, {**COMPARED, "save_steps": None}, r"goes back to a checkpoint: set train\.save_steps"),
        ({}, {**COMPARED, "save_steps": 3}, r"save_steps must be a multiple of train\.eval_steps, got 3 and 2"),
        ({}, {**COMPARED, "save_steps": 0.5}, r"must be a multiple of train\.eval_steps, got 0\.5 and 2"),
        ({}, {**COMPARED, "save_steps": 0.3, "eval_steps": 0.2}, r"multiple of train\.eval_steps, got 0\.3 and 0\.2"),
        (
            {},
            {**COMPARED, "metric_for_best_model": "rewards/margin"},
            r"have no eval_rewards/margin; did you mean eval_r",
        ),
        (
            {"several": True},
            COMPARED,
            r"name the metric of one in train\.metric_for_best_model, such as eval_safety_lo",
        ),
        (
            {"several": True},
            {**COMPARED, "metric_for_best_model": "loss"},
            r"of the sets eval_safety, eval_style_2 have",
        ),
        ({"eval_dataset_name": {"a/b": "x"}}, {}, r"'a/b' cannot be a part of the names of metrics"),
        ({"eval_dataset_name": {"aux": "x"}}, {}, r"'aux' cannot be a part of the names of metrics"),
        (
            {"eval_dataset_name": {"a": "x"}, "eval_dataset_split": {"b": "test"}},
            {},
            r"b is no set of data\.eval_datas",
        ),
        ({"eval_dataset_name": {"a": "./no"}}, {}, r"data\.eval_dataset_name\.a=\./no does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(data, options, message, make_config, sets, tmp_path):
    named = {"eval_dataset_name": sets} if data.pop("several", False) else {"eval_dataset_name": sets["safety"], **data}
    with pytest.raises((UserError, ValueError), match=message):
        train(make_config(data=named, train=options))
    assert not (tmp_path / "run").exists()


def test_a_set_of_a_mixture_that_is_split_may_decide(make_config, sets):
    one = {"name": sets["safety"], "fraction": 1.0, "label": "safety"}
    data = {"dataset_name": None, "datasets": [one], "eval_fraction": 0.5}
    for metric in ("eval/safety/loss", "loss"):
        check_metric(make_config(data=data, train={**COMPARED, "metric_for_best_model": metric}))


def test_shares_that_are_multiples_are_taken(make_config, sets):
    for save, every in ((0.3, 0.1), (0.5, 0.25), (4, 2)):
        options = {"load_best_model_at_end": True, "save_steps": save, "eval_steps": every}
        make_config(data={"eval_dataset_name": sets["safety"]}, train=options)


def test_the_best_of_other_rows_is_not_gone_on_from(compared, planned, sets, tmp_path, monkeypatch):
    config = compared(tmp_path / "run")
    with interrupted_after(monkeypatch, rows=4), pytest.raises(KeyboardInterrupt):
        train(config)
    changed = replace(config, data=replace(config.data, eval_dataset_name=sets["style_2"]))
    with pytest.raises(UserError, match=r"evaluation data is not what it was, and the best evaluation so far was of"):
        train(changed, resume=True)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert train(config, resume=True).steps == 8
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-4, the checkpoint of the best evaluation, is gone: put it back"):
        train(config, resume=True)
    last = compared(tmp_path / "run", {"load_best_model_at_end": False})
    assert train(last, resume=True).metrics["eval_loss"] == LOSSES[8]
    final, end = (load_file(tmp_path / "run" / name / "model.safetensors") for name in (".", "checkpoint-8"))
    assert all((final[name] == tensor).all() for name, tensor in end.items())
