"""Twenty optimizer steps of KTO beside TRL: a loop of one's own around ``linear_kto_loss``, on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from dpo_kernels import kto_divergence, linear_kto_loss, linear_logps
from tests.engine.conftest import build_tokenizer, preference_rows, save_tiny_model

trl = pytest.importorskip("trl")
pytest.importorskip("trl.trainer.kto_trainer")

STEPS, ROWS = 20, 6
LEARNING_RATE = 3e-3
RELATIVE = 1e-4
OPTIONS = {"beta": 0.2, "desirable_weight": 0.8, "undesirable_weight": 1.3}
Row = tuple[list[int], list[int], bool]


def unpaired_rows(count: int) -> list[dict[str, Any]]:
    """Two of three are desirable."""
    pairs = preference_rows(count)
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(pairs)
    ]


def train_with_trl(model_dir: Path, rows: list[dict[str, Any]], folder: Path, loss_type: str):
    import datasets
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    config = KTOConfig(
        output_dir=str(folder), per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=LEARNING_RATE,
        loss_type=loss_type, max_length=160, use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, **OPTIONS,
    )  # fmt: skip
    trainer = KTOTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], trainer.model


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


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_twenty_steps_equal_trl(loss_type, model_dir, tmp_path):
    rows = unpaired_rows(STEPS * ROWS)
    tokenizer = build_tokenizer()
    encoded: list[Row] = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        joint = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        assert joint[: len(prompt)] == prompt
        encoded.append((prompt, joint[len(prompt) : 160], row["label"]))
    theirs, their_model = train_with_trl(model_dir, rows, tmp_path, loss_type)
    ours, model = train_here(model_dir, encoded, loss_type)
    assert len(theirs) == STEPS
    for name in ours[0]:
        got, want = (torch.tensor([row[name] for row in history], dtype=torch.float64) for history in (ours, theirs))
        scale = max(want.abs().max().item(), 1e-6)
        assert (got - want).abs().max().item() <= RELATIVE * scale, name
    assert (max(row["kl"] for row in theirs) > 0.1) == (loss_type == "kto")
    assert min(row["loss"] for row in theirs) < 0.8 * theirs[0]["loss"]
    for (name, mine), wanted in zip(model.named_parameters(), their_model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-4, rtol=0, msg=name)
