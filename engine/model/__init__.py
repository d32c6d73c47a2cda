"""Any transformers causal language model, run on packs. Names are imported when they are asked for: models bring parts
of transformers that take seconds, which commands that read data alone do not need."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import load_adapter
    from .attention import Backend, choose_backend
    from .checks import check_packing
    from .head import read_head
    from .load import load_policy, resolve_device
    from .policy import Policy
    from .readable import check_dataset
    from .ready import load_sharded, ready_policy
    from .shard import shard_policy
    from .sources import check_folder
    from .tokenizer import load_tokenizer

_PLACES = {
    "adapters": ("load_adapter",),
    "attention": ("Backend", "choose_backend"),
    "checks": ("check_packing",),
    "head": ("read_head",),
    "load": ("load_policy", "resolve_device"),
    "policy": ("Policy",),
    "readable": ("check_dataset",),
    "ready": ("load_sharded", "ready_policy"),
    "shard": ("shard_policy",),
    "sources": ("check_folder",),
    "tokenizer": ("load_tokenizer",),
}

__all__ = [
    "Backend",
    "Policy",
    "check_dataset",
    "check_folder",
    "check_packing",
    "choose_backend",
    "load_adapter",
    "load_policy",
    "load_sharded",
    "load_tokenizer",
    "read_head",
    "ready_policy",
    "resolve_device",
    "shard_policy",
]


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
