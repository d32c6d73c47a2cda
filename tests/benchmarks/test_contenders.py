"""Every contender computes what the table says it computes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contenders as module
from benchmarks.contenders import FROZEN, GRADIENTS, LOGPS, LOSS, Contender, UnavailableError, contenders
from benchmarks.inputs import HeadInputs, make_inputs
from benchmarks.measure import errors, float64_reference, make_task
from benchmarks.shapes import HeadShape

TASKS = (LOSS, FROZEN, LOGPS, GRADIENTS)
ENTRIES = [pytest.param(task, c, id=f"{task}: {c.name}") for task in TASKS for c in contenders(task)]
LENGTH = 5


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers run as they do without a compiler: the same formula, in a fraction of the time."""
    monkeypatch.setattr(module, "no_compiler", lambda device_type: "not in this test")


@pytest.fixture(scope="module")
def inputs() -> HeadInputs:
    return make_inputs("random", HeadShape(40, 24, 300), length=LENGTH)


def prepared(contender: Contender, task):
    """None for a peer that cannot run here."""
    try:
        return contender.prepare(task)
    except UnavailableError:
        return None


@pytest.mark.parametrize(("task_name", "contender"), ENTRIES)
def test_agrees_with_float64(task_name: str, contender: Contender, inputs: HeadInputs) -> None:
    task = make_task(task_name, inputs)
    run = prepared(contender, task)
    if run is None:
        assert not contender.ours
        return
    found = errors(run(), float64_reference(task, has_reference=contender.has_reference), LENGTH)
    assert found.response is not None
    assert found.response < 2e-5
    per_token = contender.name not in ("Liger DPO", "Liger DPO, no reference", "ours: linear_dpo_loss")
    assert (found.token is not None) == per_token
    assert (found.dX is not None) == (task_name != LOGPS)
    assert (found.dW is not None) == (task_name in (LOSS, GRADIENTS))
    assert max(e for e in (found.token, found.dX, found.dW, 0.0) if e is not None) < 1e-5


@pytest.mark.parametrize("task_name", TASKS)
def test_float64_reference_against_autograd(task_name: str, inputs: HeadInputs) -> None:
    """The blockwise definition agrees with autograd through all logits at once."""
    task = make_task(task_name, inputs)
    hidden, weight = (t.double().detach().requires_grad_() for t in (inputs.hidden_ND, inputs.weight_VD))
    logps = (hidden @ weight.T).log_softmax(1).gather(1, inputs.labels_N[:, None]).squeeze(1)
    reference = float64_reference(task)
    torch.testing.assert_close(reference.logps_N, logps.detach())
    if task_name == LOGPS:
        assert reference.dX_ND is None
        return
    if task_name == GRADIENTS:
        objective = (logps * task.upstream_N).sum()
    else:
        margins = 0.1 * (logps.view(-1, LENGTH).sum(1) - task.ref_logps_S.double()).view(-1, 2)
        objective = -torch.nn.functional.logsigmoid(margins[:, 0] - margins[:, 1]).mean()
    dX, dW = torch.autograd.grad(objective, (hidden, weight))
    torch.testing.assert_close(reference.dX_ND, dX)
    if task_name != FROZEN:
        torch.testing.assert_close(reference.dW_VD, dW)


def test_pairs_are_not_saturated(inputs: HeadInputs) -> None:
    """Otherwise gradients would vanish and every error with them."""
    task = make_task(LOSS, inputs)
    ratios = float64_reference(task).logps_S - task.ref_logps_S
    margins = 0.1 * (ratios[0::2] - ratios[1::2])
    assert margins.abs().max() < 2


def test_a_missing_peer_says_which_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="some-package does not import: No module named 'no_such_module'"):
        module.imported("no_such_module", "some-package")
