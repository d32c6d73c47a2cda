"""Small trainers and batches for the tests of the TRL drop-in."""

from __future__ import annotations

import os
import random

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engine.model.families import VOCAB, tiny_model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w3, w4, ..."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_dataset(num_pairs: int = 12) -> datasets.Dataset:
    """Pairs of random words, of uneven lengths."""
    rng = random.Random(5)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(rng.randint(least, most)))

    return datasets.Dataset.from_list(
        [
            {"prompt": words(2, 6), "chosen": f" {words(1, 9)} </s>", "rejected": f" {words(1, 9)} </s>"}
            for _ in range(num_pairs)
        ]
    )


def disturb_(model: torch.nn.Module, scale: float, seed: int = 11) -> torch.nn.Module:
    """Add seeded noise to what is trained, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def make_trainer(
    trainer_class, output_dir, family="llama", *, peft_config=None, model_options=None, distance=0.03, **options
):
    """A trainer on a tiny model, the same for every class; ``distance`` sets policy and reference apart."""
    from trl import DPOConfig

    model_options = model_options or {}
    model = tiny_model(family, **model_options)
    reference = None if peft_config else disturb_(tiny_model(family, **model_options), distance)
    config = DPOConfig(
        output_dir=str(output_dir),
        use_cpu=True,
        bf16=options.pop("bf16", False),
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=options.pop("per_device_train_batch_size", 4),
        gradient_checkpointing=options.pop("gradient_checkpointing", False),
        learning_rate=options.pop("learning_rate", 1e-2),
        **options,
    )
    trainer = trainer_class(
        model,
        reference,
        args=config,
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
    if peft_config:
        disturb_(trainer.model, 0.1)
    return trainer


def train_one_step(output_dir, **options) -> tuple[dict, dict[str, torch.Tensor]]:
    """(logged row, weights) after one step of plain gradient descent on the first four pairs, over all processes."""
    from dpo_kernels.integrations.trl import FusedDPOTrainer

    trainer = make_trainer(
        FusedDPOTrainer,
        output_dir,
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer.train()
    return trainer.state.log_history[0], {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def score_sharded(rank: int, *, shard_head: bool) -> dict[str, torch.Tensor]:
    """Gradients, gathered, of ``score`` of this rank's sequence under FSDP2; averaged over ranks as FSDP2 does."""
    from torch.distributed.fsdp import fully_shard

    model, ids = sharding_case()
    for layer in (*model.model.layers, *([model.lm_head] if shard_head else [])):
        fully_shard(layer)
    fully_shard(model)
    score(model, ids[rank : rank + 1]).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def sharding_case() -> tuple[torch.nn.Module, torch.Tensor]:
    """A model with our head and two sequences."""
    from dpo_kernels.integrations.trl import add_fused_lm_head

    model = tiny_model("llama")
    add_fused_lm_head(model)
    return model, torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))


def score(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """An uneven sum of log-probs, averaged over sequences."""
    log_probs = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    return (log_probs * torch.linspace(-1, 1, log_probs.shape[1])).sum() / log_probs.shape[0]


def distributed_worker(rank: int, port: int, output_dir: str) -> None:
    """One of two processes on this machine: a step under DDP, then gradients under FSDP2."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    logged, weights = train_one_step(output_dir, per_device_train_batch_size=2, ddp_backend="gloo")
    results = {"logged": logged, "weights": weights}
    for shard_head in (False, True):
        results[f"fsdp_{shard_head}"] = score_sharded(rank, shard_head=shard_head)
    torch.save(results, f"{output_dir}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
