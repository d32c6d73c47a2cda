from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kernels.losses import LOSS_TYPES
from engine.config.schema import REFERENCE_FREE_LOSSES
from engine.errors import UserError
from engine.reference import ReferenceStore
from engine.train.checkpoint import complete_checkpoints
from engine.train.loop import train

TRAJECTORY = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "learning_rate", "num_tokens")


def assert_same_trajectory(
    ours: list[dict], theirs: list[dict], tolerance: float = 1e-5, names: tuple[str, ...] = TRAJECTORY
) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)


@pytest.fixture(scope="module")
def eval_jsonl(tmp_path_factory, pairs_jsonl):
    path = tmp_path_factory.mktemp("eval") / "eval.jsonl"
    path.write_text("".join(pairs_jsonl.read_text().splitlines(keepends=True)[:8]))
    return path


def test_a_run_learns_and_leaves_what_it_promises(make_config, rows_of, eval_jsonl, tmp_path, caplog):
    config = make_config(
        data={"eval_dataset_name": str(eval_jsonl)},
        train={"num_train_epochs": 5, "eval_steps": 8, "report_to": ["tensorboard"]},
    )
    with caplog.at_level("INFO"):
        result = train(config)
    run = tmp_path / "run"
    rows = rows_of(config)
    assert [r["step"] for r in rows] == list(range(1, 21))
    assert result.steps == 20
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < 0.4 * rows[0]["loss"]
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert [rows[i]["epoch"] for i in (0, -1)] == [0.25, 5.0]
    assert [rows[i]["learning_rate"] for i in (0, 10)] == pytest.approx([2e-3, 1e-3])
    evaluations = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if "eval_loss" in x]
    assert [e["step"] for e in evaluations] == [8, 16, 20]
    assert evaluations[-1]["eval_loss"] < 0.3
    assert evaluations[-1]["eval_rewards/accuracies"] == 1.0
    assert result.metrics["eval_loss"] == evaluations[-1]["eval_loss"]
    assert json.loads((run / "evaluation.json").read_text())["eval_num_pairs"] == 8
    assert list((run / "tensorboard").iterdir())
    data = json.loads((run / "data.json").read_text())
    assert {len(v) for v in data["lengths"].values()} == {24}
    assert (data["lint"]["kept"], data["plan"]["total_steps"]) == (24, 20)
    for words in ("attention", "sdpa", "linear_dpo_loss: torch", "24 of 24 rows", "sigmoid loss 0.693", "step 20/20"):
        assert words in caplog.text


def test_the_final_model_loads_elsewhere(make_config, tiny_model_dir, tmp_path):
    config = make_config()
    train(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert all(moved)
    ids = tokenizer("Where does the river go?", return_tensors="pt")
    assert model(**ids).logits.isfinite().all()
    card = (tmp_path / "run" / "README.md").read_text()
    for words in (
        "---\nlibrary_name: transformers",
        str(tiny_model_dir),
        "loss `sigmoid`",
        "pairs_per_step: 6",
        "torch 2.",
    ):
        assert words in card


def test_bfloat16_trains_and_is_stored_in_bfloat16(make_config, rows_of, tmp_path):
    config = make_config(model={"dtype": "bfloat16"}, train={"num_train_epochs": 2, "save_steps": 4})
    train(config)
    rows = rows_of(config)
    assert rows[-1]["loss"] < rows[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.bfloat16
    final = load_file(tmp_path / "run" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert all(torch.equal(final[name], t.bfloat16()) for name, t in saved.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": {"tokens_per_pack": 100_000}},
        {"packing": {"tokens_per_pack": 220}},
        {"packing": {"share_prompts": False}},
        {"train": {"gradient_checkpointing": True}},
        {"reference": {"mode": "live"}},
    ],
    ids=str,
)
def test_how_it_is_computed_does_not_change_what_is_learned(changes, make_config, rows_of, tmp_path):
    first = make_config(train={"output_dir": str(tmp_path / "first")})
    train(first)
    second = make_config(**changes)
    train(second)
    assert_same_trajectory(rows_of(second), rows_of(first))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_every_loss_trains(name, make_config, rows_of, tmp_path):
    settings = {"loss_type": name, "label_smoothing": 0.1 if name in ("robust", "exo_pair") else 0.0}
    config = make_config(loss=settings, optim={"learning_rate": 1e-3}, train={"num_train_epochs": 2})
    train(config)
    rows = rows_of(config)
    first, last = ([r["loss"] for r in rows[part]] for part in (slice(0, 4), slice(4, 8)))
    # discopop has its minimum below a margin of 0, so its loss may rise as the margin does.
    assert sum(last) < sum(first) or name == "discopop"
    assert all(math.isfinite(v) for r in rows for v in r.values())
    if name not in REFERENCE_FREE_LOSSES:
        assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft"])
def test_losses_of_a_whole_step_do_not_depend_on_packs(name, make_config, rows_of, tmp_path):
    runs = []
    for tokens_per_pack in (100_000, 220):
        config = make_config(
            loss={"loss_type": name},
            packing={"tokens_per_pack": tokens_per_pack},
            train={"output_dir": str(tmp_path / str(tokens_per_pack))},
        )
        train(config)
        runs.append(rows_of(config))
    assert_same_trajectory(*runs)


def test_losses_add(make_config, rows_of):
    config = make_config(loss={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]})
    train(config)
    assert rows_of(config)[0]["loss"] == pytest.approx(math.log(2) + 0.5 * 6.0, abs=0.5)


def test_rankings_train(make_config, rows_of, tmp_path):
    words = ["blue", "green", "a river", "the old house has a red door"]
    rows = [
        {"prompt": f"Question {i}:", "responses": [f" {w} {i}" for w in words[:k]], "ranking": list(range(k))}
        for i, k in enumerate([2, 3, 4] * 4)
    ]
    data = tmp_path / "ranked.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = make_config(
        data={"dataset_name": str(data)},
        packing={"shuffle": False},
        loss={"loss_type": "plackett_luce"},
        train={"num_train_epochs": 6},
    )
    train(config)
    logged = rows_of(config)
    expected = sum(math.log(math.factorial(k)) for k in (2, 3, 4)) / 3
    assert logged[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert logged[-1]["loss"] < 0.8 * logged[0]["loss"]
    with pytest.raises(UserError, match=r"row 1 has 3 responses"):
        train(make_config(data={"dataset_name": str(data)}, train={"output_dir": str(tmp_path / "pairs")}))


def test_a_run_on_rankings_of_two_is_a_dpo_run_to_the_bit(make_config, pairs_jsonl, rows_of, tmp_path):
    ranked = tmp_path / "ranked.jsonl"
    with open(ranked, "w") as file:
        for i, line in enumerate(pairs_jsonl.read_text().splitlines()):
            row = json.loads(line)
            responses, ranking = [row["chosen"], row["rejected"]], [1, 2]
            if i % 2:
                responses, ranking = responses[::-1], ranking[::-1]
            file.write(json.dumps({"prompt": row["prompt"], "responses": responses, "ranking": ranking}) + "\n")
    runs = {"sigmoid": pairs_jsonl, "plackett_luce": ranked}
    results = []
    for loss, data in runs.items():
        output_dir = tmp_path / loss
        config = make_config(
            data={"dataset_name": str(data)}, loss={"loss_type": loss}, train={"output_dir": str(output_dir)}
        )
        train(config)
        rows = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows_of(config)]
        results.append((rows, (output_dir / "model.safetensors").read_bytes()))
    assert results[0] == results[1]


def test_a_run_on_scored_completions_is_a_run_on_their_pairs(make_config, pairs_jsonl, rows_of, tmp_path):
    """The same pairs in the same steps, with half of the responses computed and stored twice or once."""
    sources = [json.loads(line) for line in pairs_jsonl.read_text().splitlines()]
    scored, expanded = tmp_path / "scored.jsonl", tmp_path / "expanded.jsonl"
    with open(scored, "w") as one, open(expanded, "w") as many:
        for row, other in zip(sources[:12], sources[12:], strict=True):
            answers = [row["chosen"], other["chosen"], row["rejected"]]
            line = {"prompt": row["prompt"], "responses": [answers[i] for i in (2, 0, 1)], "scores": [0.5, 9, 3]}
            one.write(json.dumps(line) + "\n")
            for a, b in ((0, 1), (0, 2), (1, 2)):
                line = {"prompt": row["prompt"], "chosen": answers[a], "rejected": answers[b]}
                many.write(json.dumps(line) + "\n")
    results = []
    for name, path, per_step in (("scored", scored, 4), ("expanded", expanded, 12)):
        config = make_config(
            data={"dataset_name": str(path), "eval_dataset_name": str(path)},
            packing={"pairs_per_step": per_step, "shuffle": False},
            train={"output_dir": str(tmp_path / name), "eval_steps": 2},
            reference={"store": str(tmp_path / f"store-{name}")},
        )
        result = train(config)
        results.append((rows_of(config), result.metrics))
    assert_same_trajectory(results[0][0], results[1][0], tolerance=2e-5, names=TRAJECTORY[:-1])
    # Sequences that are counted: three of a prompt, or two of each of its three pairs.
    assert results[1][0][-1]["num_tokens"] == 2 * results[0][0][-1]["num_tokens"]
    assert results[0][1]["eval_num_pairs"] == results[1][1]["eval_num_pairs"] == 36
    for key in ("eval_loss", "eval_rewards/accuracies", "eval_logps/chosen"):
        assert results[0][1][key] == pytest.approx(results[1][1][key], rel=1e-5)
    stores = [ReferenceStore(tmp_path / f"store-{name}") for name in ("scored", "expanded")]
    assert len(stores[0]) == len(stores[1]) == 36


@pytest.mark.parametrize("mode", ["auto", "live"])
def test_an_adapter_is_trained_and_saved_alone(mode, make_config, rows_of, tiny_model_dir, tmp_path):
    import peft

    config = make_config(
        model={"lora": {"r": 4}}, reference={"mode": mode}, optim={"learning_rate": 1e-2}, train={"num_train_epochs": 2}
    )
    train(config)
    rows = rows_of(config)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < 0.6
    run = tmp_path / "run"
    assert not (run / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = peft.PeftModel.from_pretrained(base, run)
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    assert all("lora_" in name for name in load_file(run / "adapter_model.safetensors"))
    assert "library_name: peft" in (run / "README.md").read_text()


def test_adapter_references_stored_and_live_agree(make_config, rows_of, tmp_path):
    runs = []
    for mode in ("auto", "live"):
        config = make_config(
            model={"lora": {"r": 4}}, reference={"mode": mode}, train={"output_dir": str(tmp_path / mode)}
        )
        train(config)
        runs.append(rows_of(config))
    assert_same_trajectory(*runs, tolerance=2e-5)


def test_rmsprop_and_a_schedule_of_the_evaluation_loss(make_config, rows_of, eval_jsonl):
    config = make_config(
        data={"eval_dataset_name": str(eval_jsonl)},
        optim={
            "optimizer": "rmsprop",
            "learning_rate": 1e-4,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 100.0},
        },
        train={"eval_steps": 1},
    )
    train(config)
    assert [r["learning_rate"] for r in rows_of(config)] == pytest.approx([1e-4, 5e-5, 2.5e-5, 1.25e-5])


def test_logging_interval_averages_and_the_last_step_is_logged(make_config, rows_of, tmp_path):
    every = make_config(train={"output_dir": str(tmp_path / "every"), "max_steps": 5})
    third = make_config(train={"logging_steps": 3, "max_steps": 5})
    train(every)
    train(third)
    single, averaged = rows_of(every), rows_of(third)
    assert [r["step"] for r in averaged] == [3, 5]
    for row, members in zip(averaged, (single[:3], single[3:]), strict=True):
        for name in ("loss", "rewards/margins", "logps/rejected"):
            assert row[name] == pytest.approx(sum(m[name] for m in members) / len(members), rel=1e-9)
        for name in ("grad_norm", "learning_rate", "num_tokens", "epoch"):
            assert row[name] == members[-1][name]


def test_clipping_is_logged_before_it_is_applied(make_config, rows_of, tmp_path):
    runs = {}
    for limit in (0.0, 1e-3, 1e6):
        config = make_config(
            optim={"max_grad_norm": limit, "optimizer": "rmsprop", "learning_rate": 1e-4},
            train={"output_dir": str(tmp_path / str(limit))},
        )
        train(config)
        runs[limit] = rows_of(config)
    assert_same_trajectory(runs[0.0], runs[1e6])
    assert runs[1e-3][0]["grad_norm"] == runs[0.0][0]["grad_norm"] > 1e-3


def test_a_step_that_is_not_finite_stops_and_keeps_the_last_checkpoint(make_config, monkeypatch, tmp_path):
    from engine.train.objective import Objective

    backward = Objective.backward

    def poisoned(self, policy, step):
        scored = backward(self, policy, step)
        if step.number == 3:
            scored.chosen_logps[1] = float("nan")
            next(policy.parameters()).grad[0, 0] = float("nan")
        self.rows = step.rows
        return scored

    monkeypatch.setattr(Objective, "backward", poisoned)
    config = make_config(train={"save_steps": 2})
    with pytest.raises(UserError) as error:
        train(config)
    for words in (
        "step 3: log-probs are not finite, rows ",
        "the step was not applied",
        "checkpoint-2",
        "learning_rate",
    ):
        assert words in str(error.value)
    assert [step for step, _ in complete_checkpoints(tmp_path / "run")] == [2]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(Objective, "backward", backward)
    assert train(config, resume=True).steps == 4


def test_a_deferred_verdict_names_the_step_that_failed_first(make_config, monkeypatch, tmp_path):
    """What happens on an accelerator, where the verdict is read at the logging interval."""
    from engine.train.objective import Objective
    from engine.train.optimizer import GuardedUpdate

    backward = Objective.backward

    def poisoned(self, policy, step):
        scored = backward(self, policy, step)
        if step.number == 2:
            next(policy.parameters()).grad[0, 0] = float("inf")
        return scored

    monkeypatch.setattr(GuardedUpdate, "deferred", True)
    monkeypatch.setattr(Objective, "backward", poisoned)
    config = make_config(train={"logging_steps": 4, "save_steps": 3})
    with pytest.raises(UserError, match=r"step 2: the loss or a gradient is not finite.*no checkpoint was due yet"):
        train(config)
    assert not complete_checkpoints(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_on_cuda_follows_the_cpu(dtype, make_config, rows_of, monkeypatch, tmp_path):
    runs = {}
    for device in ("cuda", "cpu"):
        name = "engine.train.setup.resolve_device"
        monkeypatch.setattr(name, lambda device=device: torch.device(device, *([0] if device == "cuda" else [])))
        config = make_config(
            model={"dtype": dtype},
            reference={"store": str(tmp_path / "store")},
            train={"output_dir": str(tmp_path / device), "logging_steps": 2},
        )
        train(config)
        runs[device] = [row["loss"] for row in rows_of(config)]
    assert runs["cuda"] == pytest.approx(runs["cpu"], abs=2e-3 if dtype == "float32" else 5e-2)


def test_an_absurd_learning_rate_is_stopped_before_it_is_saved(make_config, tmp_path):
    with pytest.raises(UserError, match=r"step \d+: .* not finite, rows .*the step was not applied"):
        train(make_config(optim={"learning_rate": 1e30, "max_grad_norm": 0.0}, train={"save_steps": 1}))
    for _, path in complete_checkpoints(tmp_path / "run"):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"loss_type": "simpo"}, "reference": {"mode": "stored"}}, r"simpo has no reference"),
        ({"loss": {"loss_type": "cpo"}, "reference": {"mode": "live"}}, r"cpo has no reference"),
        ({"optim": {"lr_scheduler_type": "greedy"}}, r"greedy needs train\.eval_steps"),
        ({"optim": {"lr_scheduler_type": "cosine_with_min_lr"}}, r"min_lr.*lr_scheduler_kwargs"),
        ({"packing": {"tokens_per_pack": 20}}, r"tokens_per_pack is 20, but row \d+ needs \d+"),
        ({"data": {"eval_dataset_name": "/nowhere/e.jsonl"}}, r"/nowhere/e\.jsonl"),
    ],
)
def test_what_cannot_run_is_refused_before_a_run_folder_exists(changes, message, make_config, tmp_path):
    with pytest.raises(UserError, match=message):
        train(make_config(**changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_computed(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr("engine.train.loop.prepare", lambda config: pytest.fail("prepared"))
    with pytest.raises(UserError, match=r"cannot create train\.output_dir=/proc/nothing"):
        train(make_config(train={"output_dir": "/proc/nothing"}))
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("engine.train.durable.os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="kept: permission denied"):
        train(make_config(train={"output_dir": str(tmp_path / "kept")}))
    assert (tmp_path / "kept").is_dir()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(make_config, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["Question"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = make_config(model={"tokenizer_name_or_path": str(tmp_path / "tokenizer")})
    with pytest.raises(UserError, match=r"row 0: token \d+ is outside the \d+ embeddings of LlamaForCausalLM"):
        train(config)


def test_mode_stored_names_the_missing_row(make_config, tmp_path):
    with pytest.raises(UserError, match=r"no reference log-probs for row 0 and 23 more rows.*dpo precompute"):
        train(make_config(reference={"mode": "stored", "store": str(tmp_path / "empty")}))


def test_reference_columns_of_the_data_are_used_and_checked(make_config, rows_of, pairs_jsonl, tmp_path):
    first = make_config(train={"output_dir": str(tmp_path / "first")})
    train(first)
    stored = rows_of(first)
    rows = [json.loads(line) for line in pairs_jsonl.read_text().splitlines()]
    from engine.data import load_dataset_groups
    from engine.model import load_policy, load_tokenizer
    from engine.reference import ReferenceStore, load_ref_sums, model_digest

    dataset, _ = load_dataset_groups(first.data, load_tokenizer(first.model), split="train")
    digest = model_digest(load_policy(first.model, device=torch.device("cpu")))
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


def test_several_processes_without_a_launcher_are_refused(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2 but RANK, LOCAL_RANK, .* not set: .* torchrun, or unset"):
        train(make_config())
