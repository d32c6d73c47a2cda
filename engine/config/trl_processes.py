"""The keys of TRL and accelerate that say which kernels compute blocks, and how processes divide a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .trl_model import Keys

LIGER = "-> model.kernels liger: its layers, and never its loss, since the head and the loss are fused here"
COMPILE = "-> model.kernels compile: each block by itself, for packs of every length"
ONE_KIND = "blocks have one kind of kernels: model.kernels liger"
PREFIX = "parallelism_config_"
"""Of sizes in a file of accelerate."""


class ProcessKeys(Keys):
    """Their way into ``model.kernels``, ``train.context_parallel`` and ``train.shards_per_replica``."""

    def _kernels(self) -> None:
        liger, compiled = self.trl.flag("use_liger_kernel"), self.trl.flag("torch_compile")
        if liger:
            self.result.values["model"]["kernels"] = "liger"
            self._same("use_liger_kernel", LIGER)
        if compiled and liger:
            self._same("torch_compile", ONE_KIND)
        elif compiled:
            self.result.values["model"]["kernels"] = "compile"
            self._same("torch_compile", COMPILE)

    def _division(self) -> None:
        """Sizes; that there are several processes is told where the other keys of theirs are."""
        sizes = self._sizes()
        train = self.result.values["train"]
        ranks = sizes.get("cp_size", 1) * sizes.get("sp_size", 1)
        if ranks > 1:
            train["context_parallel"] = ranks
            self._same("parallelism_config", f"-> train.context_parallel {ranks}, by heads")
        shards, copies = sizes.get("dp_shard_size", 1), sizes.get("dp_replicate_size", 1)
        if copies > 1:
            # Processes that work on a pack together are shards, too.
            train["shards_per_replica"] = shards * ranks
            self._same("parallelism_config", f"-> train.shards_per_replica {shards * ranks}, in {copies} copies")
        if sizes.get("tp_size", 1) > 1:
            self._same("parallelism_config", "tp_size: products are not divided; FSDP2 shares the weights out")
        strategy = self._strategy()
        if strategy.endswith("NO_SHARD"):
            train["shards_per_replica"] = 1
            self._same("fsdp", f"{strategy} -> train.shards_per_replica 1, the whole model on each")
        elif strategy.startswith(("HYBRID_SHARD", "_HYBRID_SHARD")):
            self._same("fsdp", f"{strategy}: set train.shards_per_replica to the GPUs of a machine")

    def _sizes(self) -> dict[str, int]:
        given = self.trl.keys.get("parallelism_config")
        if not isinstance(given, Mapping):
            return {}
        named = {str(key).removeprefix(PREFIX): value for key, value in given.items()}
        return {
            key: self.trl.as_whole("parallelism_config", named[key])
            for key in ("cp_size", "sp_size", "dp_shard_size", "dp_replicate_size", "tp_size")
            if named.get(key) is not None
        }

    def _strategy(self) -> str:
        """How FSDP shares the model out, by torch's name; empty where the file is silent."""
        options, config = self.trl.keys.get("fsdp"), self.trl.keys.get("fsdp_config")
        words: Any = options.split() if isinstance(options, str) else options if isinstance(options, list) else []
        named = [str(word).upper() for word in words]
        if isinstance(config, Mapping):
            named += [str(value).upper() for key, value in config.items() if str(key).endswith("sharding_strategy")]
        numbers = {"3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}
        known = [numbers.get(word, word) for word in named]
        return next((word for word in known if word.endswith(("NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"))), "")
