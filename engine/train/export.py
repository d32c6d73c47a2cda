"""What a finished run leaves: a model that ``from_pretrained`` loads, its tokenizer, and a card that says how it was
made.

A full model is stored in ``model.dtype``: bfloat16 runs train float32 weights and round them once, here; checkpoints
keep them in float32. An adapter is stored alone, in float32, in the layout of peft.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from engine import distributed
from engine.config import to_yaml
from engine.config.schema import RunConfig
from engine.files import sync
from engine.model import Policy
from engine.model.load import DTYPES
from engine.train.checkpoint import save_weights
from engine.train.durable import MANIFEST, TEMPORARY_SUFFIX, disk_errors, seal

CARD_FILE = "README.md"
_PACKAGES = ("dpo-kernels", "torch", "transformers", "peft", "datasets")
_LAST = ("model.safetensors.index.json", "adapter_config.json", "config.json")
"""Moved after the weights: without them no loader takes the folder for a model."""


def export_model(
    output_dir: Path, policy: Policy, tokenizer: Any, config: RunConfig, metrics: Mapping[str, float]
) -> None:
    """Write the final model into ``output_dir``. A full model is rounded to ``model.dtype`` in place.

    Every rank must call this. A sharded model is gathered on rank 0, one tensor at a time, in the CPU's memory.

    All files are written and flushed beside their final place and moved in at the end, so that a kill or a full disk
    leaves no model that is half this one. ``manifest.json`` lists them with their checksums.

    Raises:
        UserError: the disk is full or not writable.
    """
    weights = None
    if policy.sharded:
        weights = gather_weights(policy, None if policy.has_adapter else DTYPES[config.model.dtype])
    if distributed.is_main():
        _write_model(output_dir, policy, weights, tokenizer, config, metrics)
    distributed.barrier()


def gather_weights(policy: Policy, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The whole state of a sharded model, or of its adapter, in the CPU's memory of rank 0; nothing on the others.

    Tied weights are one tensor.

    Args:
        dtype: what floating-point parameters are rounded to; None leaves them as they are.
    """
    weights: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if policy.has_adapter and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            full = distributed.full_tensor(tensor.detach())
            kept = full if distributed.is_main() else full.new_zeros(0)
            seen[id(tensor)] = kept.to("cpu", dtype if kept.is_floating_point() else None, copy=True)
        weights[name] = seen[id(tensor)]
    return weights


def _write_model(
    output_dir: Path,
    policy: Policy,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: Any,
    config: RunConfig,
    metrics: Mapping[str, float],
) -> None:
    temporary = output_dir / f".model{TEMPORARY_SUFFIX}"
    with disk_errors(output_dir):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if weights is None and not policy.has_adapter:
                policy.causal_lm.to(DTYPES[config.model.dtype])
            save_weights(policy, temporary, weights)
            if weights is not None and not policy.has_adapter:
                # Written by the dtype of the sharded parameters, which is not what was gathered.
                policy.config.dtype = DTYPES[config.model.dtype]
                policy.config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / CARD_FILE).write_text(model_card(policy, config, metrics), encoding="utf-8")
            seal(temporary, editable=(CARD_FILE,))
            _move_in(temporary, output_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(output_dir)


def _move_in(source: Path, target: Path) -> None:
    for name in _LAST:
        (target / name).unlink(missing_ok=True)
    order = sorted(source.iterdir(), key=lambda p: (p.name == MANIFEST, p.name in _LAST, p.name))
    for path in order:
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)


def model_card(policy: Policy, config: RunConfig, metrics: Mapping[str, float]) -> str:
    """The model card: front matter for the Hub, then base model, data, method, results, versions, configuration."""
    model, data, loss = config.model, config.data, config.loss
    base = model.model_name_or_path
    front: dict[str, Any] = {
        "library_name": "peft" if policy.has_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preference-optimization", "dpo", *loss.loss_types, *(["lora"] if policy.has_adapter else [])],
    }
    if _on_hub(base):
        front["base_model"] = base
    if _on_hub(data.dataset_name):
        front["datasets"] = [data.dataset_name]
    name = Path(config.train.output_dir).name
    trained = "LoRA adapters" if policy.has_adapter else "all weights"
    if model.quantization:
        trained += f" on the base in {model.quantization}"
    if model.adapter_name_or_path:
        trained += f", continued from `{model.adapter_name_or_path}`"
    rows = "\n".join(f"| `{key}` | {value:.6g} |" for key, value in metrics.items() if not key.startswith("perf/"))
    versions = "\n".join(f"- {package} {version}" for package, version in package_versions().items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

`{base}` after preference training on `{data.dataset_name}` (split `{data.dataset_train_split}`).

- **Method:** {trained}, loss `{loss.loss_name}`, beta {loss.beta:g}, {_reference_words(config)}
- **Optimizer:** {_optimizer_words(config)}
- **Stored as:** {"float32 adapter" if policy.has_adapter else model.dtype}

## Results

{f"| metric | value |{chr(10)}|---|---|{chr(10)}{rows}" if rows else "None were logged."}

`eval_` values are of held-out pairs. Rewards are beta times the log-ratio of this model to the reference model.

## Versions

{versions}

## Configuration

```yaml
{to_yaml(config).strip()}
```
"""


def package_versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on, of those that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _optimizer_words(config: RunConfig) -> str:
    optim = config.optim
    return (
        f"{optim.optimizer}, learning rate {optim.learning_rate:g}, schedule `{optim.lr_scheduler_type}`, "
        f"{config.packing.pairs_per_step} preference pairs per step"
    )


def _reference_words(config: RunConfig) -> str:
    if config.reference.mode == "none":
        return "no reference model"
    other = config.reference.model_name_or_path
    own = "the adapter before training" if config.model.adapter_name_or_path else "the base model"
    return f"reference model `{other}`" if other else f"{own} as reference"


def _on_hub(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
