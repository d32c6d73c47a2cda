"""Twenty optimizer steps of KTO beside TRL: ``dpo train``, and a loop of one's own around ``linear_kto_loss``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from dpo_kernels import kto_divergence, linear_kto_loss, linear_logps
from engine.config import build_config
from engine.train.loop import train
from tests.engine.conftest import build_tokenizer, preference_rows, save_tiny_model

trl = pytest.importorskip("trl")
pytest.importorskip("trl.trainer.kto_trainer")

STEPS, ROWS = 20, 6
LEARNING_RATE = 3e-3
RELATIVE = 1e-4
OPTIONS = {"beta": 0.2, "desirable_weight": 0.8, "undesirable_weight": 1.3}
METRICS = (
    *("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"),
    *("logits/chosen", "logits/rejected", "entropy"),
)
Row = tuple[list[int], list[int], bool]


def unpaired_rows(count: int) -> list[dict[str, Any]]:
    """Two of three are desirable."""
    pairs = preference_rows(count)
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(pairs)
    ]


def run_trl(
    model_dir: Path, rows: list[dict[str, Any]], folder: Path, held_out: list[dict[str, Any]] = (), **options: Any
) -> tuple[list[dict[str, float]], Any]:
    import datasets
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    config = KTOConfig(
        output_dir=str(folder), per_device_train_batch_size=ROWS, learning_rate=LEARNING_RATE, use_cpu=True, bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        **{"max_length": 160, "max_steps": STEPS, **OPTIONS, **options},
    )  # fmt: skip
    trainer = KTOTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(held_out) if held_out else None,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.train()
    evaluation = trainer.evaluate() if held_out else {}
    return [*(row for row in trainer.state.log_history if "loss" in row), *([evaluation] if held_out else [])], (
        trainer.model
    )


def completion_rows(model: Any, batch: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
    """(hidden states that predict completion tokens, the tokens, offsets of the responses), a sequence at a time."""
    hidden = []
    for prompt, completion in batch:
        states = model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1])
    offsets = torch.tensor([0, *(len(completion) for _, completion in batch)]).cumsum(0)
    return torch.cat(hidden), torch.tensor([token for _, completion in batch for token in completion]), offsets


@torch.no_grad()
def log_probs(model: Any, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    hidden, labels, offsets = completion_rows(model, batch)
    return torch.stack(
        [p.sum() for p in linear_logps(hidden, model.lm_head.weight, labels).tensor_split(offsets[1:-1])]
    )


def train_here(model_dir: Path, rows: list[Row], loss_type: str) -> tuple[list[dict[str, float]], Any]:
    model, frozen = (AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    history = []
    for step in range(STEPS):
        members = rows[step * ROWS : (step + 1) * ROWS]
        matched = [(prompt, completion) for prompt, completion, _ in members]
        # Each completion under the prompt after its own.
        turned = [(prompt, matched[i - 1][1]) for i, (prompt, _) in enumerate(matched)]
        divergence = None
        if loss_type == "kto":
            divergence = kto_divergence(log_probs(model, turned), log_probs(frozen, turned))
        hidden, labels, offsets = completion_rows(model, matched)
        desirable = torch.tensor([label for _, _, label in members])
        out = linear_kto_loss(
            hidden, model.lm_head.weight, labels, offsets, log_probs(frozen, matched), desirable,
            loss_type=loss_type, divergence=divergence, **OPTIONS,
        )  # fmt: skip
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        row = {
            "loss": out.loss.item(),
            "grad_norm": norm.item(),
            "kl": 0.0 if divergence is None else divergence.item(),
        }
        for name, side in (("chosen", desirable), ("rejected", ~desirable)):
            row |= {f"rewards/{name}": out.rewards[side].mean().item(), f"logps/{name}": out.logps[side].mean().item()}
        history.append(row)
    return history, model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), build_tokenizer())


@pytest.fixture(scope="module")
def trl_run(model_dir, tmp_path_factory):
    """History and model of TRL's run of a loss."""
    rows = unpaired_rows(STEPS * ROWS)
    return cache(lambda loss_type: run_trl(model_dir, rows, tmp_path_factory.mktemp("trl"), loss_type=loss_type))


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]], names) -> None:
    for name in names:
        got, want = (torch.tensor([row[name] for row in history], dtype=torch.float64) for history in (ours, theirs))
        scale = max(want.abs().max().item(), 1e-6)
        assert (got - want).abs().max().item() <= RELATIVE * scale, name


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_twenty_steps_of_a_loop_equal_trl(loss_type, model_dir, trl_run):
    tokenizer = build_tokenizer()
    encoded: list[Row] = []
    for row in unpaired_rows(STEPS * ROWS):
        prompt = tokenizer(row["prompt"])["input_ids"]
        joint = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        assert joint[: len(prompt)] == prompt
        encoded.append((prompt, joint[len(prompt) : 160], row["label"]))
    theirs, their_model = trl_run(loss_type)
    ours, model = train_here(model_dir, encoded, loss_type)
    assert len(theirs) == STEPS
    assert_same(ours, theirs, ours[0])
    assert (max(row["kl"] for row in theirs) > 0.1) == (loss_type == "kto")
    assert min(row["loss"] for row in theirs) < 0.8 * theirs[0]["loss"]
    for (name, mine), wanted in zip(model.named_parameters(), their_model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-4, rtol=0, msg=name)


@pytest.fixture
def run_engine(model_dir, tmp_path):
    """``dpo train`` of the same run: rows of ``metrics.jsonl``, and the model that is written."""

    def run(rows: list[dict[str, Any]], loss_type: str, **sections: dict[str, Any]):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "model": {"model_name_or_path": str(model_dir), "dtype": "float32"},
            "data": {"dataset_name": str(tmp_path / "rows.jsonl"), "max_length": 160},
            "packing": {"pairs_per_step": ROWS, "shuffle": False, "tokens_per_pack": 250},
            "loss": {"loss_type": loss_type, **OPTIONS},
            "optim": {"learning_rate": LEARNING_RATE},
            "reference": {"store": str(tmp_path / "store")},
            "train": {"output_dir": str(tmp_path / "run"), "max_steps": STEPS, "logging_steps": 1, "report_to": []},
        }
        given = {name: values | sections.get(name, {}) for name, values in settings.items()}
        train(build_config(given, "test"))
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], AutoModelForCausalLM.from_pretrained(tmp_path / "run")

    return run


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_twenty_steps_of_dpo_train_equal_trl(loss_type, run_engine, trl_run):
    ours, model = run_engine(unpaired_rows(STEPS * ROWS), loss_type)
    theirs, their_model = trl_run(loss_type)
    assert_same(ours, theirs, METRICS + (("kl",) if loss_type == "kto" else ()))
    assert [row["num_tokens"] for row in ours] == [row["num_tokens"] for row in theirs]
    assert [(row["count/chosen"], row["count/rejected"]) for row in ours] == [(4, 2)] * STEPS
    for (name, mine), wanted in zip(model.named_parameters(), their_model.named_parameters(), strict=True):
        torch.testing.assert_close(mine, wanted[1], atol=2e-4, rtol=0, msg=name)


def test_pairs_that_are_cut_and_held_out_rows_equal_trl(run_engine, model_dir, tmp_path):
    """In steps of pairs that became rows some have rows of one label alone."""
    # TRL rolls the completions of evaluation rows by training batches, so one batch has to hold them.
    pairs, limit, steps, held_out = preference_rows(14), 70, 5, unpaired_rows(40)[-ROWS:]
    options = {"loss_type": "kto", "max_length": limit, "max_steps": steps, "per_device_eval_batch_size": ROWS}
    (*theirs, evaluation), _ = run_trl(model_dir, pairs, tmp_path / "trl", held_out, **options)
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    data = {"max_length": limit, "eval_dataset_name": str(tmp_path / "eval.jsonl")}
    ours, _ = run_engine(pairs, "kto", data=data, train={"max_steps": steps})
    # The last row is the evaluation.
    found = ours.pop()
    assert len(ours) == len(theirs) == steps
    assert_same(ours, theirs, ("loss", "grad_norm", "kl", "entropy"))
    assert [name in row for row in ours for name in METRICS] == [name in row for row in theirs for name in METRICS]
    assert {name for row in ours for name in METRICS if name not in row} >= {"rewards/rejected", "rewards/margins"}
    names = {f"eval_{name}" for name in (*METRICS, "kl") if name != "grad_norm"}
    assert_same([found], [evaluation], names)
    assert json.loads((tmp_path / "run" / "data.json").read_text())["lint"]["counts"]["truncated"] > 5
