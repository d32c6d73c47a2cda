"""Any transformers causal language model, run on packs."""

from .adapters import load_adapter
from .attention import Backend, choose_backend
from .checks import check_dataset, check_packing
from .head import read_head
from .load import load_policy, load_tokenizer, resolve_device
from .policy import Policy
from .ready import load_sharded, ready_policy
from .shard import shard_policy
from .sources import check_folder

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
