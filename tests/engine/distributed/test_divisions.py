"""Ways to divide model and packs over processes: several copies of shards, whole copies, other dtypes on the way.

As in ``test_runs.py``, one process runs the same configuration here, and numbers are compared within 1e-5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import distributed, mesh
from engine.config import build_config
from engine.errors import UserError
from engine.model import replicas
from engine.model.division import divide_work, division_words
from engine.train import setup
from engine.train.loop import train
from tests.engine.distributed.ranks import Ranks
from tests.engine.distributed.test_runs import Lab, alone, assert_same_run, read_rows, spawn
from tests.engine.distributed.worker import run_job

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "whole": {"model": {"lora": {"r": 4}}},
    "quantised": {"model": {"lora": {"r": 4}, "quantization": "nf4"}},
    "context": {"data": {"eval_dataset_name": "EVAL"}},
    "context whole": {
        "model": {"lora": {"r": 4}},
        "loss": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        "packing": {"tokens_per_pack": 420, "share_prompts": False},
        "data": {"mask_pattern": "[aeiou]"},
        "train": {"gradient_checkpointing": "selective"},
    },
    "context aot": {"loss": {"loss_type": "aot"}, "reference": {"mode": "live"}},
    # Without an epsilon Adam makes whole updates of gradients that are rounding alone.
    "context experts": {"model": {"model_name_or_path": "EXPERTS"}, "optim": {"adam_epsilon": 1e-6}},
    "kahan": {"model": {"dtype": "bfloat16"}, "optim": {"master_weights": "kahan"}},
    "stochastic": {"model": {"dtype": "bfloat16"}, "optim": {"master_weights": "stochastic", "offload": True}},
    "8 bits": {"optim": {"optimizer": "adamw_8bit"}},
    "8 bits whole": {"model": {"lora": {"r": 64}, "quantization": "nf4"}, "optim": {"optimizer": "paged_adamw_8bit"}},
}
ROUNDED = ("kahan", "stochastic")
"""Weights in bfloat16, forward passes of which round in another way in packs of another process."""
SEVERAL: dict[str, dict[str, Any]] = {
    "replicas": {"shards_per_replica": 2},
    "whole": {"shards_per_replica": 1},
    "context": {"context_parallel": 2},
    "context whole": {"context_parallel": 2, "shards_per_replica": 1},
    "context aot": {"context_parallel": 2},
    "context experts": {"context_parallel": 2},
    "context and replicas": {"context_parallel": 2, "shards_per_replica": 2},
    "8 bits replicas": {"shards_per_replica": 2},
}
"""What ``train`` says beside, where there are several processes."""
ALONE = {"replicas": "context", "context and replicas": "context", "8 bits replicas": "8 bits"}
"""Whose run of one process has the numbers of a case."""
RUNS = [("replicas", "4"), ("context and replicas", "4"), ("whole", "2"), ("quantised", "2")]
RUNS += [(case, "2") for case in CASES if case.startswith("context")]
RUNS += [("8 bits replicas", "4"), *((case, "2") for case in ("8 bits whole", *ROUNDED))]
RESUMPTIONS = [("replicas", "4 to 2"), ("replicas", "1 to 4"), ("whole", "2 to 1"), ("quantised", "1 to 2")]
RESUMPTIONS += [("context", "2 to 1"), ("context whole", "1 to 2")]
RESUMPTIONS += [("8 bits replicas", "4 to 1"), ("8 bits", "1 to 2"), ("8 bits whole", "2 to 1")]
RESUMPTIONS += [(case, kind) for case in ROUNDED for kind in ("1 to 2", "2 to 1")]


class Divided(Lab):
    """Runs of the cases of this file."""

    def run(self, case: str, run: str) -> Path:
        return super().run(ALONE.get(case, case) if run == "1" else case, run)

    def values(self, case: str, run: str) -> dict:
        values = super().values("untied", run)
        values["data"].pop("eval_dataset_name", None)
        values["train"] |= {"output_dir": str(self.run(case, run)), "eval_steps": None, "num_train_epochs": 1}
        for section, keys in CASES[ALONE.get(case, case)].items():
            values.setdefault(section, {}).update(keys)
        for section in ("model", "data"):
            values[section] = {
                k: str(self.places.get(v, v)) if isinstance(v, str) else v for k, v in values[section].items()
            }
        if run.split()[-1] != "1":
            values["train"] |= SEVERAL.get(case, {})
            if "context_parallel" in values["train"]:
                values["packing"]["tokens_per_pack"] //= 2
        return values

    def resumptions(self, *kinds: str) -> list[dict]:
        asked = [(case, kind) for case, kind in RESUMPTIONS if kind in kinds]
        return [job for case, kind in asked for job in self.resumption(case, *kind.split(" to "))]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_model_dir, tiny_tokenizer, tiny_mixture_dir) -> Divided:
    lab = Divided(tmp_path_factory.mktemp("lab"), tiny_model_dir, tiny_tokenizer)
    lab.places |= {"EVAL": lab.folder / "eval.jsonl", "EXPERTS": tiny_mixture_dir}
    with alone():
        for case in CASES:
            train(build_config(lab.values(case, "1"), "test"))
    several = lab.job("replicas", "4", kind="traffic", output=str(lab.folder / "traffic-copies"))
    several["config"]["packing"]["pairs_per_step"] = 12
    spawn(lab, 4, [*(lab.job(case, run) for case, run in RUNS if run == "4"), *lab.resumptions("1 to 4"), several])
    traffic = [traffic_job(lab, dtype) for dtype in ("float32", "bfloat16")]
    runs = [lab.job(case, run) for case, run in RUNS if run == "2"]
    spawn(lab, 2, [*runs, *traffic, *lab.resumptions("1 to 2", "4 to 2")])
    with alone():
        for job in lab.resumptions("2 to 1", "4 to 1"):
            run_job(job)
    return lab


def traffic_job(lab: Lab, dtype: str) -> dict:
    """Gradients and traffic of the first step, in which every process has one pack of one pair."""
    job = lab.job("replicas", "2", kind="traffic", output=str(lab.folder / f"traffic-{dtype}"))
    job["config"]["model"]["dtype"] = "bfloat16"
    job["config"]["packing"]["pairs_per_step"] = 2
    job["config"]["train"] |= {"shards_per_replica": None, "param_dtype": dtype}
    return job


@pytest.mark.parametrize(("case", "ranks"), RUNS)
def test_the_trajectory_is_that_of_one_process(case, ranks, lab):
    check_run(case, ranks, lab)


@pytest.mark.parametrize(("case", "kind"), RESUMPTIONS)
def test_a_run_resumes_on_another_number_of_processes(case, kind, lab):
    check_run(case, kind, lab)


def check_run(case: str, run: str, lab: Divided) -> None:
    """That a run is the one of one process: to rounding, which of bfloat16 weights is that of bfloat16."""
    found, wanted = lab.run(case, run), lab.run(case, "1")
    if case not in ROUNDED:
        assert_same_run(found, wanted)
        return
    for row, want in zip(read_rows(found), read_rows(wanted), strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(want[name], rel=2e-3)
    weights, exact = (load_file(path / "model.safetensors") for path in (found, wanted))
    moved = torch.cat([(weights[name].float() - exact[name].float()).abs().view(-1) for name in exact])
    # Without the state that was stored, the steps after it would move them by 7e-4.
    assert moved.mean() < 2e-5


def test_copies_of_shards_add_up_once_a_step(lab):
    """However many packs they have; within a copy shards are summed after each of them."""
    for rank in range(4):
        found = torch.load(lab.folder / f"traffic-copies.{rank}")
        assert found["packs"] > 1
        assert "c10d::allreduce_" not in found["calls"]
        assert found["calls"]["c10d::alltoall_base_"] == 1
        assert found["calls"]["c10d::_reduce_scatter_base_"] % found["packs"] == 0


def test_bfloat16_needs_two_thirds_of_the_traffic(lab):
    """Of every parameter, two gatherings and one sum."""
    for dtype, per_parameter in (("float32", 4 + 4 + 4), ("bfloat16", 2 + 2 + 4)):
        for rank in range(2):
            found = torch.load(lab.folder / f"traffic-{dtype}.{rank}")
            numbers = sum(grad.numel() for grad in found["grads"].values())
            assert found["bytes"] == per_parameter * numbers


def test_gradients_of_bfloat16_shards_are_as_good_as_those_of_a_bfloat16_model(lab):
    exact = own_gradients(lab, "float32", cast=False)
    same_dtype = own_gradients(lab, "bfloat16", cast=True)
    found = torch.load(lab.folder / "traffic-bfloat16.0")["grads"]

    def error(grads: dict[str, torch.Tensor]) -> float:
        return sum((grads[name].double() - exact[name]).square().sum().item() for name in exact) ** 0.5

    assert all(grad.dtype == torch.float32 for grad in found.values())
    assert 0 < error(found) <= 2 * error(same_dtype)


def own_gradients(lab: Lab, dtype: str, *, cast: bool) -> dict[str, torch.Tensor]:
    values = traffic_job(lab, "float32")["config"]
    values["model"]["dtype"] = dtype
    values["reference"]["mode"] = "live"
    with alone():
        run = setup.prepare(build_config(values, "test"))
    if cast:
        run.policy.model.bfloat16()
    run.policy.train()
    run.objective.backward(run.policy, next(iter(run.feed.steps(0))))
    return {name: p.grad.double() for name, p in run.policy.model.named_parameters()}


def test_references_of_bfloat16_shards_have_keys_of_their_own(lab):
    kept, gathered = (torch.load(lab.folder / f"traffic-{dtype}.0")["digest"] for dtype in ("float32", "bfloat16"))
    assert kept != gathered
    assert {(lab.folder / "2" / "store" / digest[:8]).is_dir() for digest in (kept, gathered)} == {True}


def test_what_is_said_of_the_processes(lab, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 8)
    words = {}
    for shards in (None, 4, 1):
        mesh.divide(shards=shards, context=1)
        words[shards] = division_words()
    assert words[None] == "parameters, gradients and optimizer state are sharded over them (FSDP2)"
    assert "sharded over 4 of them, in 2 copies of the model" in words[4]
    assert words[1] == "each holds the whole model; gradients are added up once a step"


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (8, {"shards_per_replica": 3}, "train.shards_per_replica=3 does not divide the 8 processes"),
        (2, {"param_dtype": "bfloat16", "dtype": "float32"}, "and model.dtype is float32"),
        (1, {"context_parallel": 2}, "and there is 1: start a multiple of 2 with torchrun"),
        (2, {"context_parallel": 2, "layout": "rows"}, "divides packs, and packing.layout=rows has none"),
        (1, {"param_dtype": "bfloat16"}, "one process holds its parameters whole: set it to float32"),
        (2, {"param_dtype": "bfloat16", "shards_per_replica": 1}, "every process holds the whole model"),
        (
            2,
            {"shards_per_replica": 2, "quantised": True},
            "quantised weights cannot be sharded",
        ),
    ],
)
def test_divisions_that_cannot_be_are_refused(size, changes, words, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: size)
    model: dict[str, Any] = {"model_name_or_path": "/nowhere"}
    if changes.pop("quantised", False):
        model |= {"quantization": "nf4", "lora": {"r": 4}}
    if "dtype" in changes:
        model["dtype"] = changes.pop("dtype")
    packing = {"layout": changes.pop("layout", "auto")}
    values = {"model": model, "data": {"dataset_name": "x.jsonl"}, "train": changes, "packing": packing}
    with pytest.raises(UserError) as error:
        divide_work(build_config(values, "test"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


BUCKET = 8
SHAPES = [(5,), (), (7, 3), (2,), (4,)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_gradients_are_added_in_the_order_of_the_ranks(ranks, monkeypatch):
    """Numbers whose sum depends on the order; rank 0 lacks one gradient, and all lack another, which has no sum."""
    generator = torch.Generator().manual_seed(0)
    draws = [[torch.randn(s, generator=generator) * 10.0**r for s in SHAPES] for r in range(ranks)]
    draws[0][3] = torch.zeros(2)
    longest = []
    monkeypatch.setattr(replicas, "_sum", lambda own, sum_=replicas._sum: longest.append(len(own)) or sum_(own))

    def work(rank: int) -> list[torch.Tensor | None]:
        params = [torch.zeros(s, requires_grad=True) for s in SHAPES]
        for i, (param, grad) in enumerate(zip(params, draws[rank], strict=True)):
            param.grad = None if i == 4 or (rank == 0 < ranks - 1 and i == 3) else grad.clone()
        params[2].grad = params[2].grad.t().contiguous().t()
        replicas.sum_in_order(params, bucket=BUCKET)
        return [param.grad for param in params]

    for found in Ranks(ranks, monkeypatch).run(work):
        assert found[4] is None
        for i, grad in enumerate(found[:4]):
            assert torch.equal(grad, torch.stack([draw[i] for draw in draws]).sum(0))
    # A parameter that fills more than a bucket is cut.
    assert max(longest) == BUCKET
