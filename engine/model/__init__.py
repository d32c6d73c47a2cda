"""Any transformers causal language model, run on packs."""

from engine.model.adapters import load_adapter
from engine.model.attention import Backend, choose_backend
from engine.model.checks import check_dataset, check_packing
from engine.model.head import Head, read_head
from engine.model.load import load_policy, load_tokenizer, resolve_device
from engine.model.policy import Policy
from engine.model.shard import shard_policy
from engine.model.sources import check_folder

__all__ = [
    "Backend",
    "Head",
    "Policy",
    "check_dataset",
    "check_folder",
    "check_packing",
    "choose_backend",
    "load_adapter",
    "load_policy",
    "load_tokenizer",
    "read_head",
    "resolve_device",
    "shard_policy",
]
