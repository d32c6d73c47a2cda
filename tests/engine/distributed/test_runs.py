"""Two and three processes against one: trajectory, gradients, evaluation, references; resumed by any number of them.

One process runs the same configuration here. Losses, gradient norms and weights are compared within 1e-5 of their
largest value; rewards are beta times differences of float32 log-prob sums, so within 1e-5 of the largest of those, and
means of logits within 1e-5 of a logit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from engine.config import build_config
from engine.evaluate import evaluate
from engine.reference import ReferenceStore
from engine.reference.shards import KEY_BYTES, SUFFIX, read_keys
from engine.train import setup
from engine.train.checkpoint import complete_checkpoints
from engine.train.loop import train
from engine.train.setup import prepare
from tests.engine.conftest import preference_rows
from tests.engine.distributed.launch import run_jobs
from tests.engine.distributed.worker import run_job
from tests.engine.exported import assert_written_is_measured

RELATIVE = 1e-5
PAIRS = 19
"""Not a multiple of the pairs of a step: the last one has fewer groups than there are processes."""

LORA = {"model": {"lora": {"r": 4}}, "optim": {"learning_rate": 5e-3}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "untied": {"train": {"eval_steps": 5}},
    "tied": {"model": {"model_name_or_path": "TIED"}, "train": {"gradient_checkpointing": True}},
    "lora": LORA,
    "tied head": {
        "model": {"model_name_or_path": "TIED", "lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}},
        "optim": {"learning_rate": 5e-3},
    },
    "copies": {
        "model": {
            "lora": {"r": 4, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens", "norm"]}
        },
        "optim": {"learning_rate": 5e-3},
    },
    "continued": {"model": {"adapter_name_or_path": "ADAPTER"}, "optim": {"learning_rate": 5e-3}},
    "aot": {"loss": {"loss_type": "aot"}},
    "sft mix": {
        "loss": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        "packing": {"share_prompts": False},
        "data": {"mask_pattern": "[aeiou]"},
    },
    "rankings": {"loss": {"loss_type": "plackett_luce"}, "data": {"dataset_name": "RANKINGS"}},
    "live": {
        "reference": {"mode": "live", "sync_ref_model": True, "ref_model_sync_steps": 2},
        "optim": {"optimizer": "rmsprop", "learning_rate": 1e-4},
    },
    "stream": {"data": {"streaming": True, "stream_window": 6}, "train": {"max_steps": 3}},
    "best": {
        # The first evaluation is the best, since a larger loss is better here.
        "train": {"eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
        | {"early_stopping_patience": 2, "greater_is_better": True},
    },
    "rounded": {"train": {"save_dtype": "bfloat16", "save_rounding": "stochastic"}, "optim": {"learning_rate": 1e-5}},
}
SHORT = {"tied head", "copies", "continued", "aot", "sft mix", "rankings", "live", "rounded", "best", "stream"}
EVALUATED = ("untied", "tied", "lora", "rounded", "best")
RESUMED = ("untied", "lora")
RESUMPTIONS = [
    *((case, kind) for kind in ("1 to 2", "2 to 1", "2 to 3", "3 to 2") for case in RESUMED),
    # Its reference, too, is read by another number of processes than wrote it.
    *(("live", "1 to 2"), ("live", "2 to 1")),
]
WORLDS = {2: tuple(CASES), 3: ("untied", "tied", "lora", "aot")}
"""The cases that each number of processes runs."""
RUNS = [(case, ranks) for ranks, cases in WORLDS.items() for case in cases if case != "rounded"]


class Lab:
    """Data, models and the runs of one process; a folder for each run."""

    def __init__(self, folder: Path, model_dir: Path, tokenizer):
        self.folder = folder
        self.places = {"UNTIED": model_dir, "TIED": folder / "tied", "RANKINGS": folder / "rankings.jsonl"}
        self.places["ADAPTER"] = self.run("lora", "1")
        set_seed(1)
        config = LlamaConfig.from_pretrained(model_dir)
        config.tie_word_embeddings = True
        LlamaForCausalLM(config).save_pretrained(self.places["TIED"])
        tokenizer.save_pretrained(self.places["TIED"])
        rows = preference_rows(PAIRS, seed=3)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in preference_rows(7, seed=4)))
        ranked = [
            {"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"], r["prompt"]][: 2 + i % 2]}
            for i, r in enumerate(rows)
        ]
        ranked = [{**r, "ranking": list(range(len(r["responses"])))} for r in ranked]
        self.places["RANKINGS"].write_text("".join(json.dumps(r) + "\n" for r in ranked))

    def values(self, case: str, run: str) -> dict:
        """The configuration of a case as plain values; steps of six pairs in packs of few."""
        values: dict[str, dict[str, Any]] = {
            "model": {"model_name_or_path": "UNTIED", "dtype": "float32"},
            "data": {"dataset_name": str(self.folder / "pairs.jsonl"), "max_length": 160},
            "packing": {"pairs_per_step": 6, "tokens_per_pack": 260},
            "optim": {"learning_rate": 1e-3},
            "reference": {"store": str(self.folder / run.split()[0] / "store")},
            "train": {
                "output_dir": str(self.folder / run / case),
                "logging_steps": 1,
                "report_to": [],
                "save_steps": 3,
            },
        }
        changes = CASES[case]
        values["train"]["num_train_epochs"] = 1 if case in SHORT else 2
        if case in EVALUATED:
            values["data"]["eval_dataset_name"] = str(self.folder / "eval.jsonl")
        for section, keys in changes.items():
            values.setdefault(section, {}).update(keys)
        for section in ("model", "data"):
            for key, value in values[section].items():
                values[section][key] = str(self.places.get(value, value)) if isinstance(value, str) else value
        return values

    def run(self, case: str, run: str) -> Path:
        return self.folder / run / case

    def job(self, case: str, run: str, *, kind: str = "train", resume: bool = False, **more: str) -> dict:
        return {"kind": kind, "config": self.values(case, run), "resume": resume, **more}

    def resumption(self, case: str, source: str, target: str) -> list[dict]:
        """Jobs that continue what ``source`` was when its first checkpoint was done, as "source to target"."""
        run = f"{source} to {target}"
        folders = {"source": str(self.run(case, source)), "target": str(self.run(case, run))}
        return [self.job(case, run, kind="interrupt", **folders), self.job(case, run, resume=True)]


def read_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_model_dir, tiny_tokenizer) -> Lab:
    """Runs of one process ("1"), of two and of three, and resumptions: each case in a folder of its own."""
    lab = Lab(tmp_path_factory.mktemp("lab"), tiny_model_dir, tiny_tokenizer)
    with alone():
        for case in CASES:
            train(build_config(lab.values(case, "1"), "test"))
    spawn(lab, 3, fresh_jobs(lab, 3))
    spawn(lab, 2, [*fresh_jobs(lab, 2), *resumptions(lab, "1 to 2", "2 to 2", "3 to 2")])
    spawn(lab, 3, resumptions(lab, "2 to 3"))
    with alone():
        for job in resumptions(lab, "2 to 1"):
            run_job(job)
    return lab


@contextmanager
def alone() -> Iterator[None]:
    """This process trains, with one thread, as the spawned ones do."""
    threads, measure = torch.get_num_threads(), setup.measure_matmul_rate
    torch.set_num_threads(1)
    setup.measure_matmul_rate = lambda device, dtype: 1e12
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        setup.measure_matmul_rate = measure


def fresh_jobs(lab: Lab, ranks: int) -> list[dict]:
    jobs = [lab.job(case, str(ranks)) for case in WORLDS[ranks]]
    for case in ("untied", "tied"):
        jobs.append(lab.job(case, str(ranks), kind="gradients", output=str(lab.folder / f"{case}-{ranks}.grads")))
    for case in ("untied", "lora"):
        paths = {"model": str(lab.run(case, "1")), "output": str(lab.folder / f"{case}-{ranks}.eval")}
        jobs.append(lab.job("untied", str(ranks), kind="evaluate", **paths))
    return jobs


def resumptions(lab: Lab, *kinds: str) -> list[dict]:
    asked = [*RESUMPTIONS, *((case, "2 to 2") for case in RESUMED)]
    return [
        job for kind in kinds for case, k in asked if k == kind for job in lab.resumption(case, *kind.split(" to "))
    ]


def spawn(lab: Lab, ranks: int, jobs: list[dict]) -> None:
    for ended in run_jobs(lab.folder, ranks, jobs):
        assert ended.code == 0, ended.err


def assert_same_run(run: Path, expected: Path) -> None:
    """Metrics but for speeds, and the model."""
    rows, wanted = read_rows(run), read_rows(expected)
    assert [set(row) for row in rows] == [set(row) for row in wanted]
    for name in sorted({name for row in wanted for name in row if not name.startswith("perf/")}):
        got, want = (torch.tensor([r[name] for r in found if name in r]).double() for found in (rows, wanted))
        scale = want.abs().max()
        if ("rewards/" in name and "accurac" not in name) or "logps_change" in name:
            # Differences of log-probs, whose rounding is theirs.
            scale = torch.tensor(0.1 * max(abs(row[key]) for row in wanted for key in row if "logps/" in key))
        if name.endswith("loss_se"):
            # Losses of pairs have the rounding of their mean.
            loss = name.removesuffix("_se")
            scale = torch.tensor(max(row[loss] for row in wanted if loss in row))
        if "length_bias" in name or "calibration_error" in name:
            # A correlation may be near zero, and its rounding is that of margins.
            scale = scale.clamp(min=1.0)
        if "logits/" in name:
            # Logits of about 0.16 cancel in their mean to a hundredth of that; the rounding is theirs.
            scale = scale.clamp(min=0.16)
        assert (got - want).abs().max() <= RELATIVE * scale, f"{name}: {got} {want}"
    files = [path.name for path in expected.glob("*.safetensors")]
    assert len(files) == 1
    weights, exact = load_file(run / files[0]), load_file(expected / files[0])
    assert weights.keys() == exact.keys()
    for name, tensor in exact.items():
        assert weights[name].dtype == tensor.dtype
        assert (weights[name] - tensor).abs().max() <= RELATIVE * max(1.0, tensor.abs().max()), name


@pytest.mark.parametrize(("case", "ranks"), RUNS)
def test_the_trajectory_is_that_of_one_process(case, ranks, lab):
    assert_same_run(lab.run(case, str(ranks)), lab.run(case, "1"))


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("case", ["untied", "tied"])
def test_gradients_are_equal_on_all_ranks_and_those_of_one_process(case, ranks, lab):
    run = prepare(build_config(lab.values(case, "1"), "test"))
    run.policy.train()
    run.objective.backward(run.policy, next(iter(run.feed.steps(0))))
    found = [torch.load(lab.folder / f"{case}-{ranks}.grads.{rank}") for rank in range(ranks)]
    for name, parameter in run.policy.model.named_parameters():
        assert all(torch.equal(other[name], found[0][name]) for other in found[1:])
        assert (found[0][name] - parameter.grad).abs().max() <= RELATIVE * parameter.grad.abs().max(), name


@pytest.mark.parametrize(("case", "kind"), RESUMPTIONS)
def test_a_run_resumes_on_another_number_of_processes(case, kind, lab):
    assert_same_run(lab.run(case, kind), lab.run(case, "1"))


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_resumes_to_the_same_bits_on_the_same_number_of_processes(case, lab):
    resumed, whole = lab.run(case, "2 to 2"), lab.run(case, "2")
    speedless = [[{k: v for k, v in r.items() if "perf/" not in k} for r in read_rows(run)] for run in (resumed, whole)]
    assert speedless[0] == speedless[1]
    for path in whole.glob("*.safetensors"):
        assert (resumed / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("case", ["untied", "lora"])
def test_evaluation_is_that_of_one_process(case, ranks, lab):
    with alone():
        alone_values = evaluate(build_config(lab.values("untied", "1"), "test"), str(lab.run(case, "1")))
    found = [json.loads((lab.folder / f"{case}-{ranks}.eval.{rank}").read_text()) for rank in range(ranks)]
    assert found == [alone_values] * ranks


@pytest.mark.parametrize("ranks", WORLDS)
def test_references_are_those_of_one_process_to_the_bit(ranks, lab):
    alone_store, store = (ReferenceStore(lab.folder / run / "store") for run in ("1", str(ranks)))
    models = sorted(path.name for path in store.path.iterdir())
    assert len(models) == len({"UNTIED", "TIED", *(["ADAPTER"] if ranks == 2 else [])})
    keys = {key for name in models for key in partition_keys(store, name)}
    everything = {key for name in models for key in partition_keys(alone_store, name)}
    assert keys == everything if ranks == 2 else keys < everything
    ours, theirs = store.get(sorted(keys)), alone_store.get(sorted(keys))
    assert all((ours[key] == theirs[key]).all() for key in keys)


def partition_keys(store: ReferenceStore, name: str) -> list[bytes]:
    shards = (store.path / name).glob("*" + SUFFIX)
    # As text numpy would drop zero bytes at the end.
    return [key for shard in shards for key in read_keys(shard).view(f"V{KEY_BYTES}").tolist()]


@pytest.mark.parametrize("case", EVALUATED)
def test_what_two_processes_measured_is_what_they_wrote(case, lab):
    assert_written_is_measured(lab.run(case, "2"))


def test_two_processes_round_as_one_does(lab):
    """Up to weights that differ before they are rounded."""
    found, wanted = (load_file(lab.run("rounded", run) / "model.safetensors") for run in ("2", "1"))
    same = torch.cat([(found[name] == tensor).reshape(-1) for name, tensor in wanted.items()])
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert same.float().mean() > 0.99
    for run in ("2", "1"):
        evaluation = json.loads((lab.run("rounded", run) / "evaluation.json").read_text())
        assert evaluation["eval_as_trained/loss"] != evaluation["eval_loss"]


def test_two_processes_end_early_and_leave_their_best(lab):
    for run in ("2", "1"):
        kept = [path.name for _, path in complete_checkpoints(lab.run("best", run))]
        assert kept == ["checkpoint-1", "checkpoint-3"]
        assert "step 1 of 3, the best by eval_loss" in (lab.run("best", run) / "README.md").read_text()


def test_what_two_processes_leave_is_a_model_that_loads(lab):
    run = lab.run("tied", "2")
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(run).chat_template
    assert [path.name for _, path in complete_checkpoints(run)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    names = {path.name for path in (run / "checkpoint-3").rglob("*") if path.is_file()}
    assert not any(name.endswith((".pt", ".bin", ".pkl", ".distcp", ".metadata")) for name in names)
