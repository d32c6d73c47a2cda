"""KL divergence from samples against sums over all answers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from engine.config.schema import ModelConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import UserError
from engine.model import load_policy
from engine.model.layouts import own_attention
from engine.train.divergence import divergence, sampled_divergence, token_logps

VOCABULARY = 4


def drawn(p: np.ndarray, q: np.ndarray, samples: int, seed: int):
    """Log-probs of two tokens each, drawn from ``p``: of the first, then of the second after it."""
    generator = np.random.default_rng(seed)
    first = generator.choice(VOCABULARY, samples, p=p[0])
    second = np.array([generator.choice(VOCABULARY, p=p[1 + token]) for token in first])
    return ([np.log([m[0][a], m[1 + a][b]]) for a, b in zip(first, second, strict=True)] for m in (p, q))


def test_both_estimates_are_unbiased_and_the_second_varies_less():
    """A language of two tokens whose divergence is a sum over its sixteen answers."""
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(VOCABULARY) * 5, 1 + VOCABULARY)
    q = 0.7 * p + 0.3 * generator.dirichlet(np.ones(VOCABULARY) * 5, 1 + VOCABULARY)
    exact = sum(
        p[0][a] * p[1 + a][b] * np.log(p[0][a] * p[1 + a][b] / (q[0][a] * q[1 + a][b]))
        for a, b in product(range(VOCABULARY), repeat=2)
    )
    found = divergence(*drawn(p, q, 20_000, seed=1), samples=4)
    assert found["kl"] == pytest.approx(exact, abs=4 * found["kl_se"])
    assert found["kl_k3"] == pytest.approx(exact, abs=4 * found["kl_k3_se"])
    assert found["kl_k3_se"] < 0.5 * found["kl_se"]
    assert found["kl_per_token"] == pytest.approx(found["kl"] / 2)
    assert (found["num_samples"], found["sample_length"]) == (20_000, 2.0)


def test_errors_are_those_of_prompts():
    """Two answers to each of two prompts: a mean for each prompt, then the deviation of the two."""
    own = [np.array([-1.0]), np.array([-1.0]), np.array([-2.0]), np.array([-4.0])]
    other = [np.array([-2.0]), np.array([-4.0]), np.array([-2.0]), np.array([-3.0])]
    found = divergence(own, other, samples=2)
    assert found["kl"] == 0.75
    assert found["kl_se"] == pytest.approx(np.std([2.0, -0.5], ddof=1) / np.sqrt(2))
    assert "kl_se" not in divergence(own[:2], other[:2], samples=2)


def test_the_error_of_a_token_is_that_of_a_ratio():
    """Answers of one and three tokens, whose log-ratios add up to 3 and 2: 5 / 4 a token, by hand."""
    found = divergence([np.array([0.0]), np.zeros(3)], [np.array([-3.0]), np.array([-1.0, -1.0, 0.0])], samples=1)
    assert found["kl_per_token"] == 1.25
    assert found["kl_per_token_se"] == pytest.approx(np.std([(3 - 1.25) / 2, (2 - 3.75) / 2], ddof=1) / np.sqrt(2))
    assert found["sample_length_se"] == pytest.approx(1.0)


@pytest.fixture
def policies(tiny_model_dir):
    """A model, and the same with other weights."""
    found = [
        load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32"), device=torch.device("cpu"))
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in found[0].parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return found


def logits_of(policy, ids) -> torch.Tensor:
    with torch.no_grad(), own_attention(policy):
        return policy.plain_logits(torch.tensor(ids)[None])[0]


def test_one_token_of_a_model_against_the_sum_over_its_vocabulary(policies, make_config, tiny_tokenizer):
    config = make_config(train={"sample_prompts": 3, "sample_max_new_tokens": 1})
    prompts = [np.array(ids, dtype=np.int32) for ids in ([5, 6, 7], [8], [9, 10])]
    dataset = PreferenceDataset(PreferenceGroup(i, ids, (ids, ids)) for i, ids in enumerate(prompts))
    found = sampled_divergence(*policies, dataset, config, tiny_tokenizer, samples=1500)
    exact = []
    for ids in prompts:
        p, q = (logits_of(policy, ids)[-1].double().log_softmax(-1) for policy in policies)
        exact.append((p.exp() * (p - q)).sum().item())
    assert np.mean(exact) > 0.05
    assert found["kl_k3"] == pytest.approx(np.mean(exact), rel=0.1)
    assert found["kl"] == pytest.approx(np.mean(exact), rel=0.15)
    same = sampled_divergence(policies[1], policies[1], dataset, config, tiny_tokenizer, samples=2)
    assert (same["kl"], same["kl_k3"]) == (0.0, 0.0)
    short = make_config(packing={"tokens_per_pack": 3}, train={"sample_max_new_tokens": 1})
    with pytest.raises(UserError, match="row 0 and the answer drawn to it have 4 tokens, more than packing"):
        sampled_divergence(*policies, dataset, short, tiny_tokenizer, samples=1)


def test_token_logps_are_those_of_single_sequences(policies, make_config):
    rows = [([5, 6], [7, 8, 9]), ([10], [11])]
    dataset = PreferenceDataset(
        PreferenceGroup(i, np.array(p, dtype=np.int32), (np.array(r, dtype=np.int32),)) for i, (p, r) in enumerate(rows)
    )
    for (prompt, response), values in zip(rows, token_logps(policies[0], dataset, make_config()), strict=True):
        logits = logits_of(policies[0], prompt + response)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        np.testing.assert_allclose(values, expected.numpy(), atol=1e-5)
