"""The engine from Python: a run from dictionaries, told of as it goes, and read back."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from engine import api


@pytest.fixture
def config(tiny_model_dir, pairs_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
    return api.build_config(
        {
            "model": {"model_name_or_path": str(tiny_model_dir), "dtype": "float32"},
            "data": {"dataset_name": str(pairs_jsonl), "eval_dataset_name": str(pairs_jsonl)}
            | {"eval_dataset_split": "train"},
            "packing": {"pairs_per_step": 8, "tokens_per_pack": 1024},
            "reference": {"store": str(tmp_path / "store")},
            "train": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "logging_steps": 0.5, "report_to": []},
        }
    )


def test_a_run_from_python(config, tmp_path):
    api.precompute(config)
    told = []
    result = api.train(config, callbacks=[lambda step, values: told.append((step, values))])
    run = api.load_run(result.output_dir)
    assert [step for step, _ in told] == [1, 2, 2]
    assert [values for _, values in told] == run.metrics
    assert run.config == config
    assert run.evaluation["eval_num_pairs"] == api.evaluate(config, run.folder)["eval_num_pairs"]
    again = api.train(config, resume=True)
    assert (again.steps, again.output_dir) == (2, tmp_path / "run")
    # As files have a number that is not finite.
    (run.folder / "evaluation.json").write_text('{"eval_loss": null}')
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    odd = api.load_run(run.folder)
    assert math.isnan(odd.evaluation["eval_loss"])
    assert math.isnan(odd.metrics[0]["loss"])


def test_what_a_callback_raises_ends_the_run(config):
    def refuse(step, values):
        raise ZeroDivisionError(step)

    with pytest.raises(ZeroDivisionError):
        api.train(config, callbacks=[refuse])


def test_what_is_wrong_is_a_line(tmp_path):
    with pytest.raises(api.UserError, match=r"the configuration: .*loss\.beto"):
        api.build_config({"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}, "loss": {"beto": 1}})
    for loss in ({"beta": -1}, {"loss_type": "simpo", "beta": "x"}, 3):
        with pytest.raises(api.UserError, match=r"^the configuration: loss"):
            api.build_config({"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}, "loss": loss})
    with pytest.raises(api.UserError, match=r"is not the folder of a run: it has no config\.yaml"):
        api.load_run(tmp_path)


def test_the_guide_names_what_is_there():
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(from dpo_engine\.api import .*?)^```$", page, re.M | re.S)
    names = re.search(r"import (.*)", block)[1].split(", ")
    assert all(hasattr(api, name) for name in names)
    assert json.dumps(names)
