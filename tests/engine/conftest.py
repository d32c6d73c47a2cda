"""Tiny tokenizers, a tiny model and tiny preference files for every engine test."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from engine import mesh

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BOS_CHAT_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE

SENTENCES = (
    "The lamp is on the table and the cat is under it.",
    "What colour is the sky today? It is blue, and the sea is green.",
    "Where does the river go? It goes to the sea.",
    "Tell me about the house. The house is old and has a red door.",
    "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour, water, salt and yeast, then wait.",
    "\n\nHuman: Thank you!\n\nAssistant: You are welcome. Is there anything else?",
    "I cannot help with that, but I can tell you where to ask.",
)


def build_tokenizer(
    *, bos: bool = False, chat_template: str | None = None, eos: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens; with ``bos`` its post-processor writes ``<s>`` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=specials[3:], **names)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(autouse=True)
def undivided(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test begins with how another one has divided its processes."""
    monkeypatch.setattr(mesh, "_division", mesh._Division())


def preference_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected text whose lengths vary from a few words to a few sentences."""
    rng = random.Random(seed)
    words = " ".join(SENTENCES).split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    return [
        {"prompt": f"Question {i}: {text(2, 30)}?", "chosen": f" yes, {text(1, 40)}", "rejected": f" no, {text(1, 40)}"}
        for i in range(count)
    ]


def save_tiny_model(path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a random two-layer Llama (hidden 32, 4 heads, 2 key-value heads) with ``tokenizer`` beside it."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_tokenizer():
    """``build_tokenizer`` itself, for tests that need a tokenizer with a fault."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Has EOS, pad and a chat template; adds no BOS by itself."""
    return build_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Has EOS and pad, no chat template."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Writes BOS before every text, and its chat template writes BOS, too."""
    return build_tokenizer(bos=True, chat_template=BOS_CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """What ``save_tiny_model`` writes, with ``tiny_tokenizer``."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_mixture_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer mixture of four experts, with ``tiny_tokenizer``."""
    set_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    path = tmp_path_factory.mktemp("models") / "tiny-mixture"
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pairs_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 24 prompt/chosen/rejected string rows of varied lengths."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(24)))
    return path


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell that starts tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
