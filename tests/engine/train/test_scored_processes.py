"""Several pairs of one prompt over several processes: every pair of a step counts the same, wherever it is computed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.config import to_dict
from engine.train.loop import train
from tests.engine.distributed.launch import run_jobs


def test_two_processes_equal_one_on_scored_completions(make_config, pairs_jsonl, rows_of, tmp_path):
    scored = tmp_path / "scored.jsonl"
    with open(scored, "w") as file:
        for i, line in enumerate(pairs_jsonl.read_text().splitlines()[:14]):
            row = json.loads(line)
            responses = [row["rejected"], row["chosen"], row["chosen"] + " indeed", row["rejected"] + " never"][
                : 2 + i % 3
            ]
            line = {"prompt": row["prompt"], "responses": responses, "scores": [0.5, 9, 3, 3][: len(responses)]}
            file.write(json.dumps(line) + "\n")
    configs = [
        make_config(
            data={"dataset_name": str(scored)},
            loss={"loss_type": ["sigmoid", "sft"]},
            reference={"store": str(tmp_path / f"store-{ranks}")},
            train={"output_dir": str(tmp_path / str(ranks))},
        )
        for ranks in (1, 2)
    ]
    train(configs[0])
    for process in run_jobs(tmp_path, 2, [{"kind": "train", "config": to_dict(configs[1]), "resume": False}]):
        assert process.code == 0, process.err[-2000:]
    one, two = (rows_of(config) for config in configs)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (a["step"], name)
    weights = [load_file(tmp_path / str(ranks) / "model.safetensors") for ranks in (1, 2)]
    for name, want in weights[0].items():
        torch.testing.assert_close(weights[1][name], want, rtol=0, atol=1e-5)
