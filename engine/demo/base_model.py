"""The model that the demo starts from: a tokenizer and a tiny Llama, both trained here on the synthetic language.

Legend: B sequences of a step, T tokens of the longest one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..digits import shown_number
from .size import ModelSize

END = "<|end|>"
PAD = "<|pad|>"
_LINES = 10
"""So many lines are printed while the model is trained."""
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has a token sequence, and frequent words become one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _encode(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[list[dict[str, str]]]) -> list[torch.Tensor]:
    texts = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
    return [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _batch(sequences: Sequence[torch.Tensor], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T] and labels [B, T]; padding is at the end, so that causal attention never sees it."""
    input_ids_BT = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=pad_id)
    labels_BT = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=-100)
    return input_ids_BT, labels_BT


def pretrain(
    dialogues: Sequence[list[dict[str, str]]], size: ModelSize, *, seed: int, folder: Path
) -> tuple[float, int]:
    """Train a tokenizer and a Llama on ``dialogues`` by next-token prediction and save both to ``folder``.

    Returns the mean loss of the last tenth of the steps, in nats per token, and the number of parameters.
    """
    tokenizer = train_tokenizer(message["content"] for dialogue in dialogues for message in dialogue)
    sequences = _encode(tokenizer, dialogues)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # About 1 / sqrt(hidden): at transformers' 0.02 a model this narrow needs several times the steps.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    losses = _fit(model, sequences, size, pad_id=tokenizer.pad_token_id, seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail), model.num_parameters()


def _fit(
    model: LlamaForCausalLM, sequences: Sequence[torch.Tensor], size: ModelSize, *, pad_id: int, seed: int
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=size.learning_rate, total_steps=size.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    losses = []
    said = max(1, size.steps // _LINES)
    print(f"training a Llama of {model.num_parameters():,} parameters from nothing, {size.steps} steps", flush=True)
    for step in tqdm(range(1, size.steps + 1), desc="pre-training", unit="step", leave=False, disable=None):
        chosen = torch.randint(len(sequences), (size.batch,), generator=generator)
        input_ids_BT, labels_BT = _batch([sequences[i] for i in chosen.tolist()], pad_id)
        loss = model(input_ids=input_ids_BT, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % said == 0:
            tqdm.write(f"  step {step}/{size.steps}  {shown_number(losses[-1])} nats per token")
            sys.stdout.flush()
    model.eval()
    return losses


@torch.no_grad()
def answer(folder: Path, prompts: Sequence[str], *, seed: int, max_new_tokens: int = 64) -> list[str]:
    """One answer of the model in ``folder`` to each prompt, drawn from its own distribution (temperature 1)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in prompts
    ]
    inputs_BT = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    output_BT = model.generate(
        inputs_BT["input_ids"],
        attention_mask=inputs_BT["attention_mask"],
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
    )
    prompt_tokens = inputs_BT["input_ids"].shape[1]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in output_BT[:, prompt_tokens:]]
