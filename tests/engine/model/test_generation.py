"""Answers of a policy against transformers on the saved model, and against the distribution that it computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from engine.config.schema import ModelConfig
from engine.model import load_policy
from engine.model.generation import generate
from engine.model.layouts import own_attention

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32"), device=torch.device("cpu"))


def test_the_most_likely_answers_are_those_of_transformers(policy, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    answers = generate(policy, PROMPTS, stops=[], max_new_tokens=6, temperature=0.0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
        assert answer.tolist() == expected[0, len(prompt) :].tolist()
    one_by_one = generate(policy, PROMPTS, stops=[], max_new_tokens=6, temperature=0.0, tokens_per_batch=1)
    assert [a.tolist() for a in one_by_one] == [a.tolist() for a in answers]


def test_settings_of_the_model_change_no_answer(policy, monkeypatch):
    """As generation_config.json of many instruct models has them."""
    asked = [{"temperature": 0.0}, {"temperature": 1.0}]
    plain = [generate(policy, PROMPTS, stops=[], max_new_tokens=8, **one) for one in asked]
    own = GenerationConfig(do_sample=True, temperature=0.1, top_k=2, top_p=0.5, repetition_penalty=50.0, max_length=9)
    monkeypatch.setattr(policy.causal_lm, "generation_config", own)
    for one, expected in zip(asked, plain, strict=True):
        found = generate(policy, PROMPTS, stops=[], max_new_tokens=8, **one)
        assert [a.tolist() for a in found] == [a.tolist() for a in expected]
    assert policy.causal_lm.generation_config is own


def test_an_answer_ends_with_the_first_stop(policy):
    whole = generate(policy, PROMPTS, stops=[], max_new_tokens=6, temperature=0.0)
    stop = int(whole[0][2])
    cut = generate(policy, PROMPTS, stops=[stop], max_new_tokens=6, temperature=0.0)
    for before, after in zip(whole, cut, strict=True):
        end = next((i + 1 for i, token in enumerate(before) if token == stop), len(before))
        assert after.tolist() == before[:end].tolist()


def test_first_tokens_follow_the_distribution_of_the_policy(policy):
    """No top-k, no top-p: counts of 4,000 draws against softmax of the logits."""
    draws = generate(policy, [PROMPTS[0]] * 4000, stops=[], max_new_tokens=1, tokens_per_batch=20_000, seed=3)
    with torch.no_grad(), own_attention(policy):
        p = policy.plain_logits(torch.tensor([PROMPTS[0]]))[0, -1].double().softmax(-1).numpy()
    counts = np.bincount(np.concatenate(draws), minlength=len(p))
    spread = np.sqrt(4000 * p * (1 - p))
    assert (np.abs(counts - 4000 * p) < 5 * spread + 5).all()
    assert (counts > 0).sum() > 50


def test_a_run_is_left_as_it_was(policy):
    policy.train()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    implementation = policy.config._attn_implementation
    first = generate(policy, PROMPTS, stops=[], max_new_tokens=4, seed=5)
    assert torch.equal(torch.rand(3), expected)
    assert policy.training
    assert policy.config._attn_implementation == implementation
    again = generate(policy, PROMPTS, stops=[], max_new_tokens=4, seed=5)
    assert [a.tolist() for a in first] == [a.tolist() for a in again]
