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
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config.schema import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig
from engine.config.training import TrainConfig
from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.forecast import Target
from engine.forecast.budget import largest_budget
from engine.forecast.counting import Shapes, step_of
from engine.forecast.memory import pack_of
from engine.forecast.weights import policy_without_data
from engine.model.policy import Layout
from engine.packing import plan_first_epoch
from engine.train.objective import Objective

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
LORA = LoraConfig(r=16)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "`gradient_checkpointing: selective`": {"train": {"gradient_checkpointing": "selective"}},
    "`gradient_checkpointing: true`": {"train": {"gradient_checkpointing": True}},
    "`activation_offload: true`": {"train": {"activation_offload": True}},
    "`master_weights: stochastic`": {"optim": {"master_weights": "stochastic"}},
    "`lora`": {"lora": LORA},
}
LAYER_TOKENS = 16384
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


def groups(count: int, prompt: int = 512, response: int = 256) -> list[PreferenceGroup]:
    ids = [np.arange(n, dtype=np.int32) for n in (prompt, response)]
    return [PreferenceGroup(i, ids[0], (ids[1], ids[1])) for i in range(count)]


class Work(TorchDispatchMode):
    """Operations that compute, and what they read and write; views do neither. Attention is one, whatever is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.traffic = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Attention's flat results are told of as views by no schema.
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if made and not view and not func._schema.name.startswith(("aten::empty", "aten::detach")):
            self.launches += 1
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.traffic += sum(t.nbytes for t in [*read, *made])
        return out


class Layer(NamedTuple):
    """What one more layer adds to a step of one pack."""

    saved: int
    """Bytes that lie on the device from its forward pass to its backward pass."""
    traffic: int
    """Bytes that its operations read and write, forward and backward."""
    launches: int


def layer_of(config: RunConfig, tokens: int = LAYER_TOKENS) -> Layer:
    """The third layer of a model, on an absent CUDA device."""
    target = Target.of_kind("cuda", 1)
    pack = pack_of(config, groups(tokens // 1024), Layout())
    found = []
    for layers in (2, 3):
        saved = Shapes(config, pack, target, Layout(), False).count(layers).activations
        work = Work()
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            policy = policy_without_data(config, target, layers)
            objective = Objective(config.loss, token_metrics=False)
            with work:
                objective.backward(policy, step_of(pack.to(target.device)))
        found.append((saved, work.traffic, work.launches))
    return Layer(*(more - fewer for fewer, more in zip(*found, strict=True)))


def layer_table(folders: dict[str, Path]) -> Iterator[str]:
    """Of three models, each option."""
    yield "| a layer, 16,384 tokens | option | saved for backward, MiB | traffic, GiB | launches |"
    yield "|---|---|---|---|---|"
    for model in ("0.5B", "8B", "8x7B"):
        for option, values in OPTIONS.items():
            layer = layer_of(run_config(folders[model], **values))
            numbers = f"{max(layer.saved, 0) / MIB:,.0f} | {layer.traffic / GIB:.1f} | {layer.launches}"
            yield f"| {model} | {option} | {numbers} |"


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


TABLES = {"README.md": ("what fits where", fits_table), "docs/experiments.md": ("what a layer holds", layer_table)}
"""The file of each table, and what the comments say that stand around it."""


def written(page: str) -> list[str]:
    """The lines of a table as a file has it."""
    return _parts(page)[1].strip().splitlines()


def _parts(page: str) -> tuple[str, str, str]:
    name = TABLES[page][0]
    begin, end = f"<!-- {name}: python -m benchmarks.forecast_tables -->\n", f"<!-- end of {name} -->\n"
    found = re.fullmatch(f"(.*{re.escape(begin)})(.*)({re.escape(end)}.*)", (ROOT / page).read_text("utf-8"), re.S)
    assert found is not None, f"{page} has no place for the table"
    return found[1], found[2], found[3]


def main() -> int:
    """Rewrite all tables."""
    with tempfile.TemporaryDirectory() as folder:
        folders = configs(Path(folder))
        for page, (_, table) in TABLES.items():
            before, _, after = _parts(page)
            lines = []
            for line in table(folders):
                print(line, flush=True)
                lines.append(line)
            (ROOT / page).write_text(before + "\n".join(lines) + "\n" + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
