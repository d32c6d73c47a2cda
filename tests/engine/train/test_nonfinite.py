"""A loss or gradient that is not finite: stopped before the step, rows named, the last good checkpoint kept."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from engine import cli
from engine.config import to_yaml
from engine.errors import UserError
from engine.model.policy import Policy
from engine.train.checkpoint import complete_checkpoints
from engine.train.feed import TrainingStep
from engine.train.loop import train
from engine.train.objective import Objective, Scored
from engine.train.optimizer import GuardedUpdate
from tests.engine.train.conftest import read_rows

BAD_STEP = 4


def loss_alone(objective, policy: Policy, step: TrainingStep, backward) -> Scored:
    """Log-probs and gradients stay finite."""
    scored = backward(objective, policy, step)
    losses = scored.losses.clone()
    losses[1] = float("nan")
    return scored._replace(losses=losses)


def gradient_of_one_pack(objective, policy: Policy, step: TrainingStep, backward) -> Scored:
    """One number of one gradient of the second pack; loss and log-probs stay finite."""
    parameter = [p for p in policy.parameters() if p.requires_grad][-1]
    passes = []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        if len(passes) == 2:
            grad = grad.clone()
            grad.view(-1)[0] = float("inf")
        return grad

    hook = parameter.register_hook(spoil)
    scored = backward(objective, policy, step)
    hook.remove()
    assert len(passes) == len(step.packs) > 1
    assert scored.losses.isfinite().all()
    return scored


def gradient_that_overflows(objective, policy: Policy, step: TrainingStep, backward) -> Scored:
    """Every number is finite, but not the norm."""
    scored = backward(objective, policy, step)
    for parameter in policy.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1e30)
    return scored


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("spoiled", [loss_alone, gradient_of_one_pack, gradient_that_overflows])
def test_the_step_is_not_applied(spoiled, lora, make_config, monkeypatch, tmp_path, capsys):
    """With gradients accumulated over several packs a step."""
    backward = Objective.backward
    seen: dict = {}

    def poisoned(objective, policy, step):
        if step.number != BAD_STEP:
            return backward(objective, policy, step)
        seen["rows"], seen["policy"] = step.rows, policy
        seen["before"] = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
        return spoiled(objective, policy, step, backward)

    config = make_config(model={"lora": lora}, train={"save_steps": 1, "save_total_limit": 1, "num_train_epochs": 2})
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "backward", poisoned)
        assert cli.main(["train", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    rows = ", ".join(map(str, sorted(seen["rows"])))
    kept = tmp_path / "run" / f"checkpoint-{BAD_STEP - 1}"
    assert line.startswith(f"error: step {BAD_STEP}: the loss or a gradient is not finite, rows {rows}; ")
    assert f"the step was not applied and the last checkpoint is {kept}: start a new run with a lower" in line
    # Not in float32, which it is in.
    assert line.endswith("optim.learning_rate, or without these rows")
    after = dict(seen["policy"].named_parameters())
    assert all(torch.equal(after[name], before) for name, before in seen["before"].items())
    assert complete_checkpoints(tmp_path / "run") == [(BAD_STEP - 1, kept)]
    weights = load_file(kept / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(1, BAD_STEP))
    assert cli.main(["train", str(path), "--resume"]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(1, 9))


def test_a_step_that_is_not_finite_stops_and_keeps_the_last_checkpoint(make_config, monkeypatch, tmp_path):
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


def test_an_absurd_learning_rate_is_stopped_before_it_is_saved(make_config, tmp_path):
    with pytest.raises(UserError, match=r"step \d+: .* not finite, rows .*the step was not applied"):
        train(make_config(optim={"learning_rate": 1e30, "max_grad_norm": 0.0}, train={"save_steps": 1}))
    for _, path in complete_checkpoints(tmp_path / "run"):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())
    assert not (tmp_path / "run" / "model.safetensors").exists()
