"""Resident memory that a process of a run has beside its tensors: measured here, since this process is like it."""

from __future__ import annotations

import numpy as np
import psutil
import torch

from ..config.schema import RunConfig
from ..data.groups import PreferenceGroup
from ..model import Policy
from ..model.attention import choose_backend, register_backends
from ..model.load import DTYPES
from ..packing import build_batch
from ..train.optimizer import build_optimizer

_WIDTH, _VOCAB = 64, 256


def resident_bytes(config: RunConfig, device: torch.device) -> int:
    """Resident memory of this process after a step of a tiny model.

    What a run imports is imported, and the step makes the libraries read their code and start what they need; both
    count as memory of a run, too.
    """
    from ..train import loop  # noqa: F401

    _tiny_step(config, device)
    return psutil.Process().memory_info().rss


def _tiny_step(config: RunConfig, device: torch.device) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    register_backends()
    dtype = DTYPES[config.model.dtype]
    backend = choose_backend(config.model.attention, device, dtype)
    llama = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=_VOCAB,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        attn_implementation=backend.implementation,
    )
    model: torch.nn.Module = LlamaForCausalLM(llama)
    policy = Policy(model.to(device), backend=backend, compute_dtype=dtype)
    ids = np.arange(_WIDTH, dtype=np.int32)
    batch = build_batch([PreferenceGroup(0, ids, (ids, ids[::-1].copy()))]).to(device)
    policy.logps(batch).sum().backward()
    optimizer, _ = build_optimizer(policy.model, config.optim)
    optimizer.step()
