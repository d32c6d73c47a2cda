"""A training loop of one's own on the loss op: DPO of a transformers model, without a trainer.

    python examples/own_loop.py                                        one process
    python examples/own_loop.py --mode lora                            adapters, on the head as well; by torchrun, too
    torchrun --nproc_per_node 2 examples/own_loop.py --mode ddp
    torchrun --nproc_per_node 2 examples/own_loop.py --mode fsdp2
    torchrun --nproc_per_node 2 examples/own_loop.py --mode accelerate

Without ``--model`` a tiny random model learns to prefer even tokens; no file and no network is needed. What is yours to
change: ``pairs_of_tokens``, the data.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo_kernels.hf import LinearDPOLoss, attach_head, pair_loss, response_logps

MODES = ("plain", "lora", "ddp", "fsdp2", "accelerate")
PAD = 0


def load_model(path: str | None) -> Any:
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"vocab_size": 131, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=PAD))


def pairs_of_tokens(count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of token ids: yours come from a tokenizer."""
    rng = random.Random(0)

    def tokens(first: int) -> list[int]:
        return [rng.randrange(first, 131, 2) for _ in range(rng.randint(3, 9))]

    return [(tokens(1), tokens(2), tokens(3)) for _ in range(count)]


def collate(pairs: list[tuple[list[int], list[int], list[int]]]) -> dict[str, Tensor]:
    """All chosen sequences, then all rejected ones, padded. Labels are not shifted: -100 is what does not count."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, response in rows:
        padding = length - len(prompt) - len(response)
        batch["input_ids"].append([*prompt, *response, *[PAD] * padding])
        batch["attention_mask"].append([1] * (length - padding) + [0] * padding)
        batch["labels"].append([-100] * len(prompt) + response + [-100] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def batches(pairs: list, size: int, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
    """``size`` pairs a step, the same number for every process: then the mean of their means is the mean of all."""
    for start in range(0, len(pairs) - size + 1, size):
        yield collate(pairs[start + rank : start + size : world])


def prepare(mode: str, path: str | None, learning_rate: float) -> tuple[Any, torch.optim.Optimizer, Any]:
    """(model, optimizer, accelerator or None)."""
    model = load_model(path)
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    attach_head(model)  # the only line that the model needs
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    accelerator = None
    if mode == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif mode != "accelerate":
        model.to(device)
    if mode == "ddp" or (mode == "lora" and dist.is_initialized()):
        model = torch.nn.parallel.DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    if mode == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, accelerator


def train(mode: str, path: str | None = None, *, steps: int = 10, pairs_per_step: int = 8, learning_rate: float = 1e-2):
    """(model, losses): the mean loss of every step over all processes. The last gradients stay on the model."""
    model, optimizer, accelerator = prepare(mode, path, learning_rate)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    data = list(batches(pairs_of_tokens(steps * pairs_per_step), pairs_per_step, rank, world))
    data = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in data]
    with torch.no_grad():
        # The reference is the model before step 1: its log-probs are known once and for all.
        references = [model(**batch, objective=response_logps) for batch in data]
    losses = []
    for batch, ref_logps in zip(data, references, strict=True):
        optimizer.zero_grad()
        out = model(**batch, objective=pair_loss(ref_logps, beta=0.5))
        # The model's own output would mean that the head is not attached, and its loss be that of both sides' text.
        assert isinstance(out, LinearDPOLoss)
        if accelerator is None:
            out.loss.backward()
        else:
            accelerator.backward(out.loss)
        optimizer.step()
        accuracy = (out.chosen_rewards > out.rejected_rewards).float().mean()
        means = torch.stack([out.loss.detach(), accuracy])
        if world > 1:
            dist.all_reduce(means)
        losses.append(means[0].item() / world)
        if rank == 0:
            print(f"step {len(losses)}  loss {losses[-1]:.4f}  accuracy {means[1].item() / world:.2f}", flush=True)
    return model, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="plain")
    parser.add_argument("--model", help="a folder or a Hub name of a causal language model; a tiny random one without")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if options.mode in ("ddp", "fsdp2") or (options.mode == "lora" and "RANK" in os.environ):
        if "RANK" not in os.environ:
            script = f"{Path(__file__).name} --mode {options.mode}"
            parser.error(f"--mode {options.mode} wants processes: torchrun --nproc_per_node 2 {script}")
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    train(options.mode, options.model, steps=options.steps)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
