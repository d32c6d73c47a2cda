"""The starting model and its tokenizer."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.demo.base_model import answer, pretrain, train_tokenizer
from engine.demo.corpus import dialogues
from engine.demo.size import ModelSize

TINY = ModelSize(hidden=32, layers=1, heads=2, kv_heads=1, mlp=32, steps=30, batch=8)


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_tokenizer_reads_any_text_and_closes_every_message():
    texts = [turn["content"] for dialogue in dialogues(200, 0) for turn in dialogue]
    tokenizer = train_tokenizer(texts)
    for text in (texts[0], "Zürich 2026 \u2192 \U0001f98a\n\ttabs"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    dialogue = next(dialogues(1, 0))
    whole = tokenizer.apply_chat_template(dialogue, tokenize=False)
    prompt = tokenizer.apply_chat_template(dialogue[:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    assert tokenizer(whole)["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer(whole)["input_ids"].count(tokenizer.eos_token_id) == 2


def test_pretraining_learns_saves_and_repeats(tmp_path, one_thread):
    texts = list(dialogues(100, 0))
    loss, parameters = pretrain(texts, TINY, seed=1, folder=tmp_path / "a")
    again, _ = pretrain(texts, TINY, seed=1, folder=tmp_path / "b")
    assert loss == again
    assert loss < 0.9 * math.log(700)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.num_parameters() == parameters
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.chat_template
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_answers_follow_from_the_seed_and_stop(tmp_path, one_thread):
    pretrain(list(dialogues(50, 0)), TINY, seed=1, folder=tmp_path)
    prompts = ["What does the fox eat?", "I am Anna. Where is the duck when it rains?"]
    first = answer(tmp_path, prompts, seed=3, max_new_tokens=12)
    assert len(first) == 2
    assert first == answer(tmp_path, prompts, seed=3, max_new_tokens=12)
    assert first != answer(tmp_path, prompts, seed=4, max_new_tokens=12)
    assert not any("<|" in text for text in first)
