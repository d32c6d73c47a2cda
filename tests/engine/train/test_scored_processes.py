"""Several pairs of one prompt, and unpaired rows, over two processes: each counts the same, wherever it is computed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.config import to_dict
from engine.train.loop import train
from tests.engine.distributed.launch import run_jobs


def scored_completions(rows, path):
    with open(path, "w") as file:
        for i, row in enumerate(rows):
            responses = [row["rejected"], row["chosen"], row["chosen"] + " indeed", row["rejected"] + " never"]
            line = {"prompt": row["prompt"], "responses": responses[: 2 + i % 3], "scores": [0.5, 9, 3, 3][: 2 + i % 3]}
            file.write(json.dumps(line) + "\n")
    return str(path)


def test_two_processes_equal_one(make_config, pairs_jsonl, rows_of, tmp_path):
    rows = [json.loads(line) for line in pairs_jsonl.read_text().splitlines()[:14]]
    # Pairs become rows, and some steps have a pack that one process lacks.
    runs = {
        "scored": {
            "data": {"dataset_name": scored_completions(rows, tmp_path / "scored.jsonl")},
            "loss": {"loss_type": ["sigmoid", "sft"]},
        },
        "unpaired": {
            "data": {"max_rows": 9},
            "loss": {"loss_type": "kto", "undesirable_weight": 0.1},
            "packing": {"tokens_per_pack": 250},
        },
    }
    configs = {
        (name, ranks): make_config(
            **sections,
            reference={"store": str(tmp_path / f"store-{ranks}")},
            train={"output_dir": str(tmp_path / f"{name}-{ranks}")},
        )
        for name, sections in runs.items()
        for ranks in (1, 2)
    }
    for name in runs:
        train(configs[name, 1])
    jobs = [{"kind": "train", "config": to_dict(configs[name, 2]), "resume": False} for name in runs]
    for process in run_jobs(tmp_path, 2, jobs):
        assert process.code == 0, process.err[-2000:]
    for name in runs:
        one, two = (rows_of(configs[name, ranks]) for ranks in (1, 2))
        assert len(one) == len(two) == 3
        compared = {"loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "num_tokens"}
        compared |= {"kl", "count/chosen", "count/rejected"} if name == "unpaired" else set()
        for a, b in zip(one, two, strict=True):
            assert compared & a.keys() == compared & b.keys()
            for metric in compared & a.keys():
                assert a[metric] == pytest.approx(b[metric], rel=1e-5, abs=1e-5), (name, a["step"], metric)
        weights = [load_file(tmp_path / f"{name}-{ranks}" / "model.safetensors") for ranks in (1, 2)]
        for parameter, want in weights[0].items():
            torch.testing.assert_close(weights[1][parameter], want, rtol=0, atol=1e-5)
    assert max(row["kl"] for row in rows_of(configs["unpaired", 2])) > 0
