"""``preference_loss`` and ``plackett_luce_loss`` as functions: dtypes, errors, rankings."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dpo_kernels import plackett_luce_loss, preference_loss


def four(num_pairs: int = 4, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [-10 * torch.rand(num_pairs, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_dtypes(given: torch.dtype, returned: torch.dtype) -> None:
    tensors = four(dtype=given)
    out = preference_loss(*tensors)
    expected = preference_loss(*(t.to(returned) for t in tensors))
    for value, other in zip(out, expected, strict=True):
        assert value.dtype == returned
        torch.testing.assert_close(value, other, atol=0, rtol=0)


def test_rewards_are_detached_and_inputs_unchanged() -> None:
    tensors = [t.requires_grad_() for t in four()]
    before = [t.detach().clone() for t in tensors]
    out = preference_loss(*tensors, loss_type="aot")
    out.loss.sum().backward()
    assert out.loss.requires_grad
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_logps": torch.zeros(3)}, r"rejected_logps must have shape \[4\].*got \[3\]"),
        ({"chosen_logps": torch.zeros(4, 1)}, r"must have shape \[pairs\]; got \[4, 1\]"),
        ({"ref_chosen_logps": None}, "sigmoid needs ref_chosen_logps"),
        ({"loss_type": "ipo"}, "ipo needs chosen_lengths"),
        ({"loss_type": ["sigmoid", "simpo"]}, r"sigmoid \+ simpo needs chosen_lengths"),
        ({"beta": -1.0}, "beta must be positive; got -1.0"),
        ({"loss_type": "sft", "mean_chosen_length": 0.0}, "mean_chosen_length must be positive"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str) -> None:
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    arguments = dict(zip(names, four(), strict=True))
    if change.get("loss_type") == "sft":
        arguments |= {"chosen_lengths": torch.ones(4), "rejected_lengths": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        preference_loss(**(arguments | change))


@pytest.mark.parametrize("name", ["sigmoid", "exo_pair", "aot", "sft", "discopop", "orpo"])
def test_compiles_whole(name: str) -> None:
    lengths = {"chosen_lengths": torch.tensor([3, 4, 5, 6]), "rejected_lengths": torch.tensor([1, 2, 3, 9])}
    tensors = [t.requires_grad_() for t in four(dtype=torch.float64)]
    torch._dynamo.reset()
    compiled = torch.compile(preference_loss, fullgraph=True, backend="aot_eager")
    expected = preference_loss(*tensors, loss_type=name, **lengths)
    found = compiled(*tensors, loss_type=name, **lengths)
    torch.testing.assert_close(found.loss, expected.loss)
    weights = torch.rand(4, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((out.loss * weights).sum(), tensors, materialize_grads=True) for out in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plackett_luce_of_two_has_the_bits_of_dpo(dtype: torch.dtype) -> None:
    logps, refs = -100 * torch.rand(64, 2, dtype=dtype), -100 * torch.rand(64, 2, dtype=dtype)
    logps[0, 0] = -1e5
    logps[1, 1] = -1e5
    a, b = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    ranking = plackett_luce_loss(a, refs, beta=0.3)
    pairs = preference_loss(b[:, 0], b[:, 1], refs[:, 0], refs[:, 1], beta=0.3)
    assert torch.equal(ranking.loss, pairs.loss)
    assert torch.equal(ranking.rewards, torch.stack(pairs[1:], dim=1))
    ranking.loss.sum().backward()
    pairs.loss.sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_plackett_luce_golden_values(shared_dir) -> None:
    golden = json.loads((shared_dir / "golden" / "dpo_losses.json").read_text())["plackett_luce"]
    for case in golden:
        rewards = torch.tensor([case["rewards_best_first"]], dtype=torch.float64)
        out = plackett_luce_loss(rewards / 0.1, torch.zeros_like(rewards), beta=0.1)
        assert abs(out.loss.item() - case["loss"]) < 1e-6


def test_plackett_luce_against_its_formula() -> None:
    logps, refs = -5 * torch.rand(3, 6, dtype=torch.float64), -5 * torch.rand(3, 6, dtype=torch.float64)
    logps.requires_grad_()
    rewards = 0.7 * (logps - refs)
    expected = -sum(rewards[:, k] - rewards[:, k:].logsumexp(dim=1) for k in range(6))
    out = plackett_luce_loss(logps, refs, beta=0.7)
    torch.testing.assert_close(out.loss, expected)
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x, refs, beta=0.7).loss, logps)
    same = torch.full((1, 5), -3.0)
    torch.testing.assert_close(plackett_luce_loss(same, same).loss.item(), math.log(math.factorial(5)))


@pytest.mark.parametrize(
    ("logps", "refs", "message"),
    [
        (torch.zeros(3), torch.zeros(3), "must have shape"),
        (torch.zeros(3, 1), torch.zeros(3, 1), r"responses >= 2\]; got \[3, 1\]"),
        (torch.zeros(3, 2), torch.zeros(3, 3), r"must have shape \[3, 2\]; got \[3, 3\]"),
    ],
)
def test_plackett_luce_errors(logps: torch.Tensor, refs: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plackett_luce_loss(logps, refs)
