"""What a stored log-prob depends on, as a key: the reference model and what computes it, the tokens, and the boundary.

Nothing else is in the key. What computes a log-prob is dtype, kind of device, precision of products, attention backend,
implementation of the head, and torch and transformers up to their minor versions: these change numbers, by a model's
code or by more than packs do. Kernels of blocks change them by no more than another packing does, and are not in it.
Learning rate, beta, loss, output folder, packing and prompt sharing change no log-prob, so they never cause a second
pass.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dpo_kernels.dispatch import choose

from .. import distributed, mesh
from ..data.groups import PreferenceDataset
from ..model.layouts import attention_name

if TYPE_CHECKING:
    from ..model.policy import Policy

KEY_SCHEMA = 2
"""Raised when keys get other contents: a new version then does not find what an older one has stored."""
_ATTENTION_PACKAGES = {"flash": "flash-attn", "flash3": "flash-attn-3"}
"""The other backends are part of torch or of this package."""
_CHUNK_BYTES = 64 << 20
_THREADS, _GATHERED = 8, 2
"""That read weights; and tensors of several processes that wait for them, each whole."""
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


class ModelIdentity(NamedTuple):
    """The function that a policy is in reference mode."""

    weights: str
    """``weights_digest`` of the policy."""
    profile: dict[str, str]
    """What computes with them, by name."""

    @property
    def digest(self) -> str:
        """A name for all of it: 32 hexadecimal digits."""
        return self._digest(json.dumps({"schema": KEY_SCHEMA, **self.profile}, sort_keys=True))

    @property
    def first_digest(self) -> str:
        """The name under the first schema of keys, which held dtype and attention backend alone."""
        return self._digest(f"{self.profile['dtype']}/{self.profile['attention'].partition(' ')[0]}")

    def _digest(self, profile: str) -> str:
        hasher = blake2b(digest_size=16)
        _feed(hasher, "profile", profile)
        _feed(hasher, "weights", self.weights)
        return hasher.hexdigest()


def model_digest(policy: Policy) -> str:
    """``identify(policy).digest``."""
    return identify(policy).digest


def identify(policy: Policy, weights: str | None = None) -> ModelIdentity:
    """What ``policy`` is in reference mode.

    It covers the names, dtypes, shapes and bytes of the weights (tied ones are read once), the architecture's config,
    and what computes: see the top of this file. Adapters that are trained are left out, so a LoRA run and a full run
    of the same weights, held in the same dtype, share their references.

    Weights are read in chunks of 64 MiB, several at a time, wherever they are; nothing else is copied. Sharded ones are
    gathered, one at a time, on every rank, and each rank reads its share of them.

    Args:
        policy: the model, before its first optimizer step. A frozen adapter that is part of its reference is covered,
            weights and config.
        weights: its ``weights_digest``, where that is known: large models take minutes to read.
    """
    return ModelIdentity(weights or weights_digest(policy), _profile(policy))


def _profile(policy: Policy) -> dict[str, str]:
    device, dtype, name = policy.device, policy.compute_dtype, attention_name(policy)
    package = _ATTENTION_PACKAGES.get(name)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        # Of 32-bit products: the user may allow TF32.
        "matmul": torch.get_float32_matmul_precision(),
        "attention": name if package is None else f"{name} {_minor_version(package)}",
        "head": choose("linear_logps", "auto", device, dtype).impl,
        "torch": _minor_version("torch"),
        "transformers": _minor_version("transformers"),
        **_gathered_profile(),
    }


def _gathered_profile() -> dict[str, str]:
    """What shards of parameters compute in, where that is not what they are kept in."""
    dtype = mesh.gathered_dtype()
    return {} if dtype is None else {"parameters": str(dtype).removeprefix("torch.")}


def _minor_version(package: str) -> str:
    """Such as 2.13; fixes, and the build for a device, change no number."""
    try:
        return ".".join(metadata.version(package).split("+")[0].split(".")[:2])
    except metadata.PackageNotFoundError:
        return "unknown"


def weights_digest(policy: Policy) -> str:
    """Weights and config, which are part of ``identify``: 32 hexadecimal digits."""
    hasher = blake2b(digest_size=16)
    _feed(hasher, "config", _as_json(policy.config, _IGNORED_CONFIG))
    if (reference_adapter := policy.reference_adapter) is not None:
        adapter = policy.model.peft_config[reference_adapter]  # type: ignore[index]
        _feed(hasher, "adapter", _as_json(adapter, _IGNORED_ADAPTER_CONFIG))
    tensors = dict(sorted(_reference_tensors(policy, reference_adapter), key=lambda item: item[0]))
    storage = {name: _identity(tensor) for name, tensor in tensors.items()}
    unique = {storage[name]: tensor for name, tensor in tensors.items()}
    digests = dict(zip(unique, _digests(list(unique.values())), strict=True))
    for name, tensor in tensors.items():
        _feed(hasher, name, f"{tensor.dtype} {tuple(tensor.shape)} {digests[storage[name]]}")
    return hasher.hexdigest()


def _digests(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Of each tensor, in threads; several processes share the work, and every one gets all."""
    size, rank = distributed.size(), distributed.rank()
    found: dict[int, str] = {}
    running: deque[tuple[int, Future[str]]] = deque()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for place, tensor in enumerate(tensors):
            # All ranks must gather the same sharded tensor at a time.
            full = distributed.full_tensor(tensor.detach())
            if place % size == rank:
                running.append((place, pool.submit(_tensor_digest, full)))
            # What was gathered takes memory until it is read.
            while len(running) > (_GATHERED if size > 1 else len(tensors)):
                done, digest = running.popleft()
                found[done] = digest.result()
        found |= {done: digest.result() for done, digest in running}
    for part in distributed.gather(found):
        found |= part
    return [found[place] for place in range(len(tensors))]


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
    flat = tensor.detach().reshape(-1)
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
