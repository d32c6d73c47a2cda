"""What a finished run leaves: a model that ``from_pretrained`` loads, its tokenizer, and a card that says how it was
made.

Weights are stored as they were trained, in float32 or what ``optim.master_weights`` holds them in, or in the dtype of
``train.save_dtype``; checkpoints keep them as they are. An adapter is stored alone, in the layout of peft. The files
beside the weights are made to fit them: config, tokenizer and its chat template, generation config, and what the base
has for other inputs than text.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from .. import distributed
from ..config import to_yaml
from ..config.losses import REFERENCE_FREE_LOSSES
from ..config.schema import DataConfig, ModelConfig, RunConfig
from ..digits import figures
from ..durable import FOLDER_SUFFIX, MANIFEST, disk_errors, seal, sync
from ..model import Policy
from ..model.adapter_forms import ADAPTER_CONFIG
from ..model.companions import copy_companions, set_dtype
from ..model.composites import read_whole
from ..model.load import DTYPES
from ..model.sources import MODEL_CONFIG
from ..paths import names_a_path
from ..run_folder import CARD_FILE, EXPERT_LAYER, MODEL_FILES, TRAIN_SOURCE
from .checkpoint import save_weights
from .rounding import gather_weights
from .storage import stored_dtypes

_PACKAGES = ("dpo-kernels", "torch", "transformers", "peft", "datasets")
_LAST = ("model.safetensors.index.json", ADAPTER_CONFIG, MODEL_CONFIG)
"""Moved after the weights: without them no loader takes the folder for a model."""


class Origin(NamedTuple):
    """What became of the trained weights before they were written, in words; None where nothing did."""

    checkpoint: str | None = None
    """Which one they are of, where it is not the last."""
    rounding: str | None = None
    """What rounding to ``train.save_dtype`` changed."""


def export_model(
    output_dir: Path,
    policy: Policy,
    tokenizer: Any,
    config: RunConfig,
    metrics: Mapping[str, float],
    origin: Origin = Origin(),  # noqa: B008 - immutable
) -> None:
    """Write the final model into ``output_dir``.

    Every rank must call this. A sharded model is gathered on rank 0, one tensor at a time, in the CPU's memory, and so
    is one that is stored in another dtype.

    All files are written and flushed beside their final place and moved in at the end, so that a kill or a full disk
    leaves no model that is half this one. ``manifest.json`` lists them with their checksums.

    Args:
        origin: for the model card.

    Raises:
        UserError: the disk is full or not writable.
    """
    dtypes = stored_dtypes(policy, config)
    weights = gather_weights(policy, dtypes) if policy.sharded or dtypes else None
    if distributed.is_main():
        card = model_card(policy, config, metrics, origin)
        write_model(output_dir, policy, weights, tokenizer, config.model, DTYPES[stored_dtype(config)], card)
    distributed.barrier()


def write_model(
    output_dir: Path,
    policy: Policy,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: Any,
    model: ModelConfig,
    dtype: torch.dtype,
    card: str,
) -> None:
    """Write a model, or an adapter alone, with all that stands beside it into ``output_dir``, which is there.

    Args:
        weights: what is written in place of the weights that ``policy`` holds.
        model: where the base, its processors and its code are.
        dtype: that most weights have.
        card: the text of the model card.
    """
    temporary = output_dir / f".model{FOLDER_SUFFIX}"
    with disk_errors(output_dir):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            whole = None if policy.has_adapter else read_whole(model, policy.causal_lm)
            save_weights(policy, temporary, weights, whole)
            if not policy.has_adapter:
                # Written by the dtype of the first parameter, which may be one that the model keeps in float32.
                written = policy.config if whole is None else whole.config
                set_dtype(written, dtype)
                written.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            copy_companions(model, temporary)
            (temporary / CARD_FILE).write_text(card, encoding="utf-8")
            seal(temporary, editable=(CARD_FILE,))
            _move_in(temporary, output_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(output_dir)


def stored_dtype(config: RunConfig) -> str:
    """The dtype that most weights are stored in."""
    return config.optim.weights_dtype if config.train.save_dtype == "auto" else config.train.save_dtype


def _move_in(source: Path, target: Path) -> None:
    for name in _LAST:
        (target / name).unlink(missing_ok=True)
    made = {path.name for path in source.iterdir()}
    for stale in {path for pattern in MODEL_FILES for path in target.glob(pattern) if path.name not in made}:
        # Such as the one file of an earlier model beside the shards of this one, which loaders would take.
        stale.unlink()
    order = sorted(source.iterdir(), key=lambda p: (p.name == MANIFEST, p.name in _LAST, p.name))
    for path in order:
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)


def model_card(
    policy: Policy,
    config: RunConfig,
    metrics: Mapping[str, float],
    origin: Origin = Origin(),  # noqa: B008 - immutable
) -> str:
    """The model card: front matter for the Hub, then base model, data, method, results, versions, configuration."""
    model, data, loss = config.model, config.data, config.loss
    base = model.model_name_or_path
    front: dict[str, Any] = {
        "library_name": "peft" if policy.has_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preference-optimization", "dpo", *loss.loss_types, *(["lora"] if policy.has_adapter else [])],
    }
    if not names_a_path(base):
        front["base_model"] = base
    if public := [name for name in data.names if not names_a_path(name)]:
        front["datasets"] = public
    name = Path(config.train.output_dir).name
    trained = "LoRA adapters" if policy.has_adapter else "all weights"
    if model.quantization:
        trained += f" on the base in {model.quantization}"
    if model.adapter_name_or_path:
        trained += f", continued from `{model.adapter_name_or_path}`"
    kept = {key: value for key, value in metrics.items() if not key.startswith(("perf/", EXPERT_LAYER, TRAIN_SOURCE))}
    rows = "\n".join(f"| `{key}` | {words} |" for key, words in figures(kept).items())
    versions = "\n".join(f"- {package} {version}" for package, version in package_versions().items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

`{base}` after preference training on {_data_words(data)}.

- **Method:** {trained}, loss `{loss.loss_name}`, beta {loss.beta:g}, {_reference_words(config)}
- **Optimizer:** {_optimizer_words(config)}
- **Stored as:** {_storage_words(policy, config, origin.rounding)}
{f"- **Checkpoint:** {origin.checkpoint}{chr(10)}" if origin.checkpoint else ""}
## Results

{f"| metric | value |{chr(10)}|---|---|{chr(10)}{rows}" if rows else "None were logged."}

{_metric_words(origin.rounding)}

## Versions

{versions}

## Configuration

```yaml
{to_yaml(config).strip()}
```
"""


def merged_card(card: str | None, name: str, model: ModelConfig, merged: str) -> str:
    """The card of a model that an adapter was merged into.

    Args:
        card: that of the adapter's run; None where there is none.
        merged: what was merged, as a line of it.
    """
    base = model.model_name_or_path
    found = None if card is None else re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S)
    front = (yaml.safe_load(found[1]) if found else None) or {"pipeline_tag": "text-generation", "tags": []}
    front["library_name"] = "transformers"
    front["tags"] = [tag for tag in front.get("tags", ()) if tag != "lora"]
    if not names_a_path(base):
        front["base_model"] = base
    body = found[2] if found else f"\n# {name}\n\n`{base}` with an adapter merged into it.\n\n{merged}"
    body = re.sub(r"^# .*$", lambda _: f"# {name}", body, count=1, flags=re.M)
    body = re.sub(r"^- \*\*Stored as:\*\* .*\n", lambda _: merged, body, count=1, flags=re.M)
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---\n{body}"


def _data_words(data: DataConfig) -> str:
    if not data.datasets:
        return f"{', '.join(f'`{name}`' for name in data.names)} (split `{data.dataset_train_split}`)"
    sets = (f"`{one.name}` (split `{one.split}`)" for one in data.datasets)
    return f"a mixture of {', '.join(sets)}"


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


def _storage_words(policy: Policy, config: RunConfig, rounding: str | None) -> str:
    kind = "adapter in " if policy.has_adapter else ""
    return kind + (rounding or f"{stored_dtype(config)}, as trained")


def _metric_words(rounding: str | None) -> str:
    of = "" if rounding is None else " and of the weights as they are stored; `eval_as_trained/` is before rounding"
    ratio = "Rewards are beta times the log-ratio of this model to the reference model."
    return f"`eval_` values are of held-out pairs{of}. {ratio}"


def _reference_words(config: RunConfig) -> str:
    r = config.reference
    if REFERENCE_FREE_LOSSES.issuperset(config.loss.loss_types):
        return "no reference model"
    other = r.model_name_or_path
    own = "the adapter before training" if config.model.adapter_name_or_path else "the base model"
    words = f"reference model `{other}`" if other else f"{own} as reference"
    if not r.sync_ref_model:
        return words
    moved = f"moved towards the trained model by {r.ref_model_mixup_alpha:g} every {r.ref_model_sync_steps:,} steps"
    return f"{words}, {moved}"
