"""The same training run by TRL, for benchmarks and parity tests."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DIALOGUE_TURN = "\n\nAssistant:"


@dataclass(frozen=True)
class TrlRun:
    """What TRL did."""

    log_history: list[dict[str, float]]
    """One row per optimizer step."""
    precompute_seconds: float
    train_seconds: float
    final_weights: dict[str, torch.Tensor]
    step_seconds: list[float]


def hh_pairs(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """Prompt, chosen and rejected strings of the Anthropic dialogues that share everything up to the last answer."""
    rows = []
    for line in lines:
        (prompt, _, chosen), (other, _, rejected) = (line[k].rpartition(DIALOGUE_TURN) for k in ("chosen", "rejected"))
        if prompt == other:
            rows.append({"prompt": prompt + DIALOGUE_TURN, "chosen": chosen, "rejected": rejected})
    return rows


def train_with_trl(
    model_dir: Path,
    data_file: Path,
    work_dir: Path,
    *,
    pairs_per_step: int,
    max_steps: int = -1,
    learning_rate: float = 1e-6,
    max_length: int = 1024,
    micro_batches: int = 1,
    gradient_checkpointing: bool = False,
    peft_config: Any = None,
    adapter_dir: Path | None = None,
    save_to: Path | None = None,
    cuda: bool = False,
    precompute: bool = True,
    **config_options,
) -> TrlRun:
    """Train one epoch or ``max_steps`` steps in source order with ``DPOTrainer``, float32 on the CPU.

    Reference log-probs are precomputed by TRL in a cache of their own, so that nothing is left over from another run.

    Args:
        micro_batches: gradient accumulation steps, each of ``pairs_per_step // micro_batches`` pairs.
        peft_config: a fresh adapter of this kind is trained.
        adapter_dir: the values that the fresh adapter starts with; without ``peft_config``, a trained adapter to
            continue, whose frozen copy TRL takes as the reference.
        save_to: a folder for the trained model, as TRL leaves it.
        precompute: the reference's log-probs; otherwise it stays beside the policy.
        cuda: on the GPU instead, in bfloat16 with float32 weights.
    """
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    dataset = datasets.load_dataset(
        "json", data_files=str(data_file), split="train", cache_dir=str(work_dir / "datasets-cache")
    )
    config = DPOConfig(
        output_dir=str(work_dir / "trl"),
        per_device_train_batch_size=pairs_per_step // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=max_steps,
        num_train_epochs=1,
        learning_rate=learning_rate,
        max_length=max_length,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=gradient_checkpointing,
        use_cpu=not cuda,
        bf16=cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **config_options,
    )

    class TimedTrainer(DPOTrainer):
        """Measures the precompute pass, which runs while the trainer is built."""

        precompute_seconds = 0.0

        def _precompute_ref_logps(self, *args, **kwargs):
            start = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **kwargs)
            self.precompute_seconds += time.perf_counter() - start
            return result

    class Clock(TrainerCallback):
        """When each step ended, on the device."""

        def __init__(self):
            self.times: list[float] = []

        def on_step_end(self, *args, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    continued = adapter_dir is not None and peft_config is None
    if continued:
        model = _with_adapter(model, adapter_dir)
    trainer = TimedTrainer(
        model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    if adapter_dir is not None and not continued:
        _set_adapter(trainer.model, adapter_dir)
    clock = Clock()
    trainer.add_callback(clock)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    if save_to is not None:
        trainer.save_model(str(save_to))
    return TrlRun(
        log_history=[row for row in trainer.state.log_history if "loss" in row],
        precompute_seconds=trainer.precompute_seconds,
        train_seconds=seconds,
        final_weights={name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        step_seconds=[after - before for before, after in itertools.pairwise([start, *clock.times])],
    )


def _with_adapter(model: Any, adapter_dir: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=True)


def _set_adapter(model: Any, adapter_dir: Path) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(adapter_dir / "adapter_model.safetensors"))
