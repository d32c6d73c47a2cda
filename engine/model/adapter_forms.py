"""Forms of low-rank adapters: those that change more than their layers, and those whose start changes the base.

PiSSA, OLoRA and the like take a part out of the base weights and train that. Loading such an adapter repeats this, and
with it off the model is the rest of its base. Their frozen copy is made without it, and the base is another model.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..paths import expanded
from .sources import ADAPTER_CONFIG, MODEL_CONFIG, first_line

ADAPTER_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
READ_ERRORS = (
    RuntimeError, ValueError, TypeError, OSError, KeyError, AttributeError, ImportError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip
"""What peft raises on an adapter that it cannot read, or that does not fit."""

# Starts that peft makes, or when loading leaves out, without a change of the base weights.
_STARTS_BESIDE_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# By field of peft's config, what an adapter has that the layers alone do not say.
_UNSUPPORTED = {
    "trainable_token_indices": "has trained embeddings of single tokens (trainable_token_indices)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "kasa_config": "cuts parts of its base off (kasa_config)",
    "monteclora_config": "draws random weights (monteclora_config)",
    "alora_invocation_tokens": "is switched on by tokens of the text (alora_invocation_tokens)",
    "arrow_config": "is one of several between which tokens are routed (arrow_config)",
}
_NOT_MERGED = ("alora_invocation_tokens", "arrow_config")
_MERGE = "merge it into its base with peft's merge_and_unload and train on that"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds the weights of an adapter."""
    return any((folder / name).exists() for name in (ADAPTER_FILE, _PICKLED_FILE))


def base_of_adapter(source: str) -> tuple[str, str | None] | None:
    """The base that an adapter names, and its revision; None for what is no adapter, or a model with one beside it.

    Args:
        source: a folder or a Hub id.

    Raises:
        UserError: an adapter that names no base, or whose config is damaged.
    """
    from transformers.utils import find_adapter_config_file

    folder = expanded(source)
    if (folder / MODEL_CONFIG).exists():
        return None
    try:
        path = find_adapter_config_file(str(folder) if folder.is_dir() else source)
    except (OSError, ValueError):
        return None
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{source} is an adapter whose {ADAPTER_CONFIG} is damaged: {first_line(error)}") from error
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{source} is an adapter whose {ADAPTER_CONFIG} names no base_model_name_or_path: write it there"
        )
    return str(base), config.get("revision")


def check_form(peft: Any, source: str, what: str) -> None:
    """Raise a ``UserError`` for an adapter that is no low-rank one, or that is more than its layers.

    Args:
        what: the adapter, in words.
    """
    config = peft.PeftConfig.from_pretrained(source)
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(f"{what} is an adapter of kind {config.peft_type}: only LORA is supported")
    for field, words in _UNSUPPORTED.items():
        if value := getattr(config, field, None):
            remedy = "train a plain LoRA adapter instead" if field in _NOT_MERGED else _MERGE
            raise UserError(f"{what} {words.format(_listed(value))}, which is not supported: {remedy}")
    if config.bias != "none":
        raise UserError(f"{what} has trained biases (bias: {config.bias}), which are not supported: {_MERGE}")
    if config.init_lora_weights == "corda":
        raise UserError(
            f"{what} starts from a part of its base that peft cannot find again from its folder alone "
            "(init_lora_weights: corda): save it as a plain adapter, with path_initial_model_for_weight_conversion of "
            "peft's save_pretrained"
        )
    if config.init_lora_weights == "loftq" and not _has_gpu():
        raise UserError(f"{what} starts from a quantised base (init_lora_weights: loftq), which peft makes on a GPU")
    # peft takes the names as ends of names
    copies = [f"{name}." for name in config.modules_to_save or ()]
    stored = (n for n in stored_names(source) or () if not any(copy in n for copy in copies))
    if embeddings := [n for n in stored if "lora_" not in n and ".base_layer." not in n]:
        named = ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in embeddings}))
        raise UserError(
            f"{what} stores {named} beside its layers, as after tokens were added, which is not supported: resize "
            f"the embeddings of its base, then {_MERGE}"
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _listed(value: Any) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list | set | tuple) else ""


def changes_base(source: str) -> bool:
    """Whether the base of an adapter is another function while the adapter is loaded, even when it is off.

    Raises:
        UserError: the adapter cannot be read.
    """
    import peft

    try:
        start = getattr(peft.PeftConfig.from_pretrained(source), "init_lora_weights", True)
        names = stored_names(source) or ()
    except READ_ERRORS as error:
        raise UserError(f"the adapter {source} cannot be read: {first_line(error)}") from error
    return any(".base_layer." in n for n in names) or (isinstance(start, str) and start not in _STARTS_BESIDE_BASE)


def stored_names(source: str) -> set[str] | None:
    """The names of the tensors of an adapter in a folder; None for one on the Hub.

    Raises:
        OSError: there are none.
    """
    folder = expanded(source)
    if not folder.is_dir():
        return None
    if (folder / _PICKLED_FILE).exists() and not (folder / ADAPTER_FILE).exists():
        import torch

        return set(torch.load(folder / _PICKLED_FILE, map_location="cpu", weights_only=True))
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        return set(file.keys())
