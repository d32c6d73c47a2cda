"""What a stored log-prob depends on, as a key: the reference model and how it computes, the tokens, and the boundary.

Nothing else is in the key. Learning rate, beta, loss, output folder, packing and prompt sharing change no log-prob, so
they never cause a second pass.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine import distributed
from engine.data.groups import PreferenceDataset

if TYPE_CHECKING:
    from engine.model.policy import Policy

_CHUNK_BYTES = 64 << 20
# Facts about a config's origin or about generation; everything else may change what the model computes.
_IGNORED_CONFIG = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
})  # fmt: skip
_IGNORED_ADAPTER_CONFIG = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version",
    "revision", "target_modules", "task_type",
})  # fmt: skip


def model_digest(policy: Policy) -> str:
    """A name for the function that ``policy`` is in reference mode: 32 hexadecimal digits.

    It covers the names, dtypes, shapes and bytes of the weights (tied ones are read once), the architecture's config,
    the compute dtype and the attention backend. Adapters that are trained are left out, so a LoRA run and a full run
    of the same weights, held in the same dtype, share their references.

    Weights are read in chunks of 64 MiB, several at a time, wherever they are; nothing else is copied. Sharded ones are
    gathered, one at a time, on every rank.

    Args:
        policy: the model, before its first optimizer step. A frozen adapter that is part of its reference is covered,
            weights and config.
    """
    hasher = blake2b(digest_size=16)
    _feed(hasher, "profile", f"{str(policy.compute_dtype).removeprefix('torch.')}/{policy.backend.name}")
    _feed(hasher, "weights", weights_digest(policy))
    return hasher.hexdigest()


def weights_digest(policy: Policy) -> str:
    """What ``model_digest`` covers without the compute dtype and the attention backend: 32 hexadecimal digits."""
    hasher = blake2b(digest_size=16)
    _feed(hasher, "config", _as_json(policy.config, _IGNORED_CONFIG))
    if (reference_adapter := policy.reference_adapter) is not None:
        adapter = policy.model.peft_config[reference_adapter]  # type: ignore[index]
        _feed(hasher, "adapter", _as_json(adapter, _IGNORED_ADAPTER_CONFIG))
    tensors = dict(sorted(_reference_tensors(policy, reference_adapter), key=lambda item: item[0]))
    storage = {name: _identity(tensor) for name, tensor in tensors.items()}
    unique = {storage[name]: tensor for name, tensor in tensors.items()}
    # All ranks must gather the same sharded tensor at a time.
    with ThreadPoolExecutor(1 if distributed.size() > 1 else min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(unique, pool.map(_tensor_digest, unique.values()), strict=True))
    for name, tensor in tensors.items():
        _feed(hasher, name, f"{tensor.dtype} {tuple(tensor.shape)} {digests[storage[name]]}")
    return hasher.hexdigest()


def _identity(tensor: torch.Tensor) -> tuple:
    """Equal for tied weights."""
    if hasattr(tensor, "to_local"):
        # Local parts of different tensors may both be empty, so where they lie says nothing.
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def response_key(digest: str, prompt_ids: np.ndarray, response_ids: np.ndarray) -> bytes:
    """The store's key of one response: 16 bytes, the first 4 of them from ``digest``.

    Args:
        digest: from ``model_digest``.
        prompt_ids: int32 [P]. Where the prompt ends is part of the key: it decides which tokens are scored.
        response_ids: int32 [R].
    """
    return _finish(_prompt_hasher(digest, prompt_ids), digest, response_ids)


def dataset_keys(dataset: PreferenceDataset, digest: str) -> list[tuple[bytes, ...]]:
    """The keys of every response of every group; prompts are hashed once."""
    keys = []
    for group in dataset:
        hasher = _prompt_hasher(digest, group.prompt_ids)
        keys.append(tuple(_finish(hasher.copy(), digest, r) for r in group.response_ids))
    return keys


def _prompt_hasher(digest: str, prompt_ids: np.ndarray):
    hasher = blake2b(bytes.fromhex(digest), digest_size=12)
    hasher.update(struct.pack("<q", len(prompt_ids)))
    hasher.update(_id_bytes(prompt_ids))
    return hasher


def _finish(hasher, digest: str, response_ids: np.ndarray) -> bytes:
    hasher.update(_id_bytes(response_ids))
    return bytes.fromhex(digest[:8]) + hasher.digest()


def _id_bytes(ids: np.ndarray) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def _reference_tensors(policy: Policy, reference_adapter: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as the model has without peft, and tensors, of all that the reference computes with."""
    adapter_prefix = getattr(policy.model.base_model, "prefix", "lora_") if policy.has_adapter else None
    for name, tensor in policy.causal_lm.state_dict(keep_vars=True).items():
        parts = name.split(".")
        if adapter_prefix is not None:
            if "modules_to_save" in parts or any(part.startswith(adapter_prefix) for part in parts):
                if reference_adapter not in parts:
                    continue
                parts = ["reference" if part == reference_adapter else part for part in parts]
            parts = [part for part in parts if part not in ("base_layer", "original_module")]
        yield ".".join(parts), tensor


def _tensor_digest(tensor: torch.Tensor) -> str:
    hasher = blake2b(digest_size=16)
    flat = distributed.full_tensor(tensor.detach()).reshape(-1)
    step = max(1, _CHUNK_BYTES // flat.element_size())
    for start in range(0, flat.numel(), step):
        hasher.update(flat[start : start + step].cpu().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _feed(hasher, name: str, value: str) -> None:
    # Lengths first, so that no two different lists of fields are one byte string.
    for text in (name, value):
        data = text.encode()
        hasher.update(struct.pack("<q", len(data)))
        hasher.update(data)


def _as_json(config: Any, ignored: frozenset[str]) -> str:
    """A transformers or peft config without its ``ignored`` fields."""
    kept = {name: value for name, value in config.to_dict().items() if name not in ignored}
    return json.dumps(kept, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
