"""Tables of what a run holds and moves, from shapes alone: ``python -m benchmarks.forecast_tables`` rewrites them.

README.md says what fits where, as ``dpo plan --memory`` finds it. docs/experiments.md says of a layer what it keeps for
its backward pass, what its operations read and write, and how many there are, for each option that saves memory. All of
it is counted on tensors without data, of models whose config is all that there is: no GPU, no weights.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.layer_work import PROCESSES, groups, layer_of, spread_of, update_of
from engine.config.schema import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig
from engine.config.training import TrainConfig
from engine.data.groups import PreferenceDataset
from engine.forecast import Target
from engine.forecast.budget import largest_budget
from engine.model.policy import Layout
from engine.packing import plan_first_epoch

ROOT = Path(__file__).resolve().parents[1]
GIB, MIB = 2**30, 2**20
_LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
MODELS: dict[str, dict[str, Any]] = {
    "0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "8B": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "8x7B": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Qwen2.5-0.5B, Llama-3.1-8B, Mixtral-8x7B and Llama-3.1-70B."""
LAYERS_OF = ("0.5B", "8B", "8x7B")
UPDATED = ("0.5B", "8B", "8x7B")
LORA = LoraConfig(r=16)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "`gradient_checkpointing: selective`": {"train": {"gradient_checkpointing": "selective"}},
    "`gradient_checkpointing: true`": {"train": {"gradient_checkpointing": True}},
    "`activation_offload: true`": {"train": {"activation_offload": True}},
    "`master_weights: stochastic`": {"optim": {"master_weights": "stochastic"}},
    "`kernels: liger`": {"kernels": "liger"},
    "`kernels: compile`": {"kernels": "compile"},
    "`context_parallel: 2`": {"train": {"context_parallel": 2}},
    "`lora`": {"lora": LORA},
}
"""What changes the forward and backward pass."""
UPDATES: dict[str, dict[str, Any]] = {
    "none": {},
    "`master_weights: stochastic`": {"master_weights": "stochastic"},
    "`master_weights: kahan`": {"master_weights": "kahan"},
    "`offload: true`": {"offload": True},
    "`master_weights: kahan`, `offload: true`": {"master_weights": "kahan", "offload": True},
    "`optimizer: adamw_8bit`": {"optimizer": "adamw_8bit"},
    "`optimizer: paged_adamw`": {"optimizer": "paged_adamw"},
    "`optimizer: paged_adamw_8bit`": {"optimizer": "paged_adamw_8bit"},
}
"""What changes the update: the ``optim`` section."""
SPREADS: dict[str, dict[str, Any]] = {
    "none": {},
    "`param_dtype: bfloat16`": {"param_dtype": "bfloat16"},
    "`shards_per_replica: 4`": {"shards_per_replica": 4},
    "`shards_per_replica: 1`": {"shards_per_replica": 1},
}
"""What changes how several processes hold a model: the ``train`` section."""
_SAVING = {"gradient_checkpointing": True}
_ROUNDED = {"master_weights": "stochastic"}
FITS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "full": ("0.5B", 1, {}),
    "full, `gradient_checkpointing: true`": ("0.5B", 1, {"train": _SAVING}),
    "LoRA r 16, `gradient_checkpointing: true`": ("8B", 1, {"train": _SAVING, "lora": LORA}),
    "full, `master_weights: stochastic`, `adamw_8bit`, `gradient_checkpointing: true`": (
        "8B",
        1,
        {"train": _SAVING, "optim": {**_ROUNDED, "optimizer": "adamw_8bit"}},
    ),
    "full, float32 weights, `gradient_checkpointing: true`": ("8B", 8, {"train": _SAVING}),
    "QLoRA r 16, `gradient_checkpointing: true`": ("70B", 1, {"train": _SAVING, "lora": LORA, "quantization": "nf4"}),
}
"""Model, devices, options."""
DEVICES = (24, 48, 80)
"""GiB."""


def configs(folder: Path) -> dict[str, Path]:
    """Folders with a config.json each."""
    for name, values in MODELS.items():
        (folder / name).mkdir(parents=True)
        shared = {"max_position_embeddings": 131072, "tie_word_embeddings": False}
        (folder / name / "config.json").write_text(json.dumps({**shared, **values}, allow_nan=False))
    return {name: folder / name for name in MODELS}


def run_config(model: Path, *, train: dict | None = None, optim: dict | None = None, **options: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(model), **options),
        data=DataConfig(dataset_name="pairs"),
        train=TrainConfig(**(train or {})),
        optim=OptimConfig(**(optim or {})),
    )


def layer_table(folders: dict[str, Path]) -> Iterator[str]:
    """Of three models, each option."""
    yield "| a layer, 16,384 tokens | option | saved for backward, MiB | traffic, GiB | launches |"
    yield "|---|---|---|---|---|"
    for model in LAYERS_OF:
        for option, values in OPTIONS.items():
            layer = layer_of(run_config(folders[model], **values))
            numbers = f"{max(layer.saved, 0) / MIB:,.0f} | {layer.traffic / GIB:.1f} | {layer.launches}"
            yield f"| {model} | {option} | {numbers} |"


def update_table(folders: dict[str, Path]) -> Iterator[str]:
    """Of three models, each option of an update."""
    yield "| an update of a layer | option | held, bytes a weight | on the host | traffic | over the bus | launches |"
    yield "|---|---|---|---|---|---|---|"
    for model in UPDATED:
        for option, values in UPDATES.items():
            found = update_of(run_config(folders[model], optim=values))
            numbers = (found.resident, found.host, found.traffic, found.bus)
            yield f"| {model} | {option} | {' | '.join(f'{abs(n):.2f}' for n in numbers)} | {found.launches} |"


def spread_table(folders: dict[str, Path]) -> Iterator[str]:
    """Of three models, each way to hold them on several devices."""
    yield f"| a layer on each of {PROCESSES} GPUs | option | held, bytes a weight | gathered a pack | gradients sent |"
    yield "|---|---|---|---|---|"
    for model in LAYERS_OF:
        for option, values in SPREADS.items():
            found = spread_of(run_config(folders[model], train=values))
            yield f"| {model} | {option} | {' | '.join(f'{n:.2f}' for n in found)} |"


def fits(folders: dict[str, Path], name: str) -> list[int | None]:
    """The largest ``packing.tokens_per_pack`` on each of ``DEVICES``; None where none does."""
    model, processes, values = FITS[name]
    config = run_config(folders[model], **values)
    dataset = PreferenceDataset(groups(256))
    options: dict[str, Any] = {"target": Target.of_kind("cuda", processes), "resident": 0, "layout": Layout()}
    steps = plan_first_epoch(dataset, config)
    found = (largest_budget(config, dataset, steps, room=size * GIB, **options) for size in DEVICES)
    return [budget.tokens or None for budget in found]


def fits_table(folders: dict[str, Path]) -> Iterator[str]:
    """The rows of ``FITS``."""
    yield f"| model | GPUs | trained | {' | '.join(f'{size} GiB' for size in DEVICES)} |"
    yield "|---|---|---|---|---|---|"
    for name, (model, processes, _) in FITS.items():
        cells = " | ".join("-" if tokens is None else f"{tokens:,}" for tokens in fits(folders, name))
        yield f"| {model} | {processes} | {name} | {cells} |"


TABLES = {
    "what fits where": ("README.md", fits_table),
    "what a layer holds": ("docs/experiments.md", layer_table),
    "what an update moves": ("docs/experiments.md", update_table),
    "what several processes send": ("docs/experiments.md", spread_table),
}
"""What the comments say that stand around each table, and its file."""


def written(name: str) -> list[str]:
    """The lines of a table as a file has it."""
    return _parts(name)[1].strip().splitlines()


def _parts(name: str) -> tuple[str, str, str]:
    page = TABLES[name][0]
    begin, end = f"<!-- {name}: python -m benchmarks.forecast_tables -->\n", f"<!-- end of {name} -->\n"
    found = re.fullmatch(f"(.*{re.escape(begin)})(.*)({re.escape(end)}.*)", (ROOT / page).read_text("utf-8"), re.S)
    assert found is not None, f"{page} has no place for the table"
    return found[1], found[2], found[3]


def main() -> int:
    """Rewrite the tables that are named, or all."""
    with tempfile.TemporaryDirectory() as folder:
        folders = configs(Path(folder))
        for name in sys.argv[1:] or TABLES:
            page, table = TABLES[name]
            lines = []
            for line in table(folders):
                print(line, flush=True)
                lines.append(line)
            before, _, after = _parts(name)
            (ROOT / page).write_text(before + "\n".join(lines) + "\n" + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
