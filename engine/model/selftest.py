"""Small computations whose right results are known, for ``dpo doctor``: attention, and a step of training."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dpo_kernels import linear_dpo_loss, preference_loss

from ..data.groups import PreferenceGroup
from ..packing.layout import Segment, build_batch, plan_attention
from .attention import Backend, flex, packed_attention, register_backends
from .attention.interface import lack
from .attention.scores import Scores
from .attention.segments import open_attention
from .policy import Policy

_SEGMENTS = [Segment(0, 40, 0, 0), Segment(40, 61, 0, 17), Segment(61, 70, 0, 17), Segment(70, 90, 70, 70)]
_CASES: tuple[dict[str, Any], ...] = ({}, {"sliding_window": 6}, {"softcap": 2.0}, {"s_aux": torch.linspace(-1, 1, 4)})
_SHAPES = ((1, 4, 90, 64), (1, 2, 90, 64), (1, 2, 90, 64))
"""Of queries, keys and values."""
_VOCABULARY = 512


class Errors(NamedTuple):
    """Errors of an output and of its gradients, each as a share of their norm."""

    output: float
    gradient: float


class Step(NamedTuple):
    """One optimizer step of a tiny model whose reference is itself."""

    loss: float
    """Before the step; ln 2 is right."""
    gradient_error: float
    """Against the model's own forward in float32, as a share of the norm."""
    loss_after: float


def cannot_compile(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend that is compiled when a layer needs it would be passed over, or None."""
    if name != "flex":
        return None
    query, key, value = (torch.empty(shape, device=device, dtype=dtype) for shape in _SHAPES)
    return flex.failure(query, key, value, Scores(0.125, window=None, softcap=None, sinks=None, chunk=None))


def attention_errors(name: str, device: torch.device, dtype: torch.dtype) -> Errors:
    """Attention of one backend over a small pack, plain and with a window, a cap and sinks where it has them, against
    scores in the open in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in _SHAPES]
    upstream = torch.randn(1, 90, 4, 64, generator=generator).to(device, dtype)
    plan = plan_attention(_SEGMENTS).map_tensors(lambda tensor: tensor.to(device))
    worst = Errors(0.0, 0.0)
    for case in _CASES:
        window, softcap, sinks = case.get("sliding_window"), case.get("softcap"), case.get("s_aux")
        sinks = None if sinks is None else sinks.to(device)
        if lack(name, inputs[0], inputs[2], Scores(1 / 8, window, softcap, sinks, chunk=None)) is not None:
            continue
        options = case if sinks is None else {"s_aux": sinks}
        output, _ = packed_attention((name,), nn.Module(), *inputs, attention_plan=plan, **options)
        gradients = torch.autograd.grad(output, inputs, upstream)
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        q, k, v = exact_inputs
        exact = open_attention(q, k, v, plan, scaling=1 / 8, window=window, softcap=softcap, sinks=sinks)
        exact_gradients = torch.autograd.grad(exact, exact_inputs, upstream.double())
        shares = [_share(a, b) for a, b in zip(gradients, exact_gradients, strict=True)]
        worst = Errors(max(worst.output, _share(output, exact)), max(worst.gradient, *shares))
    return worst


def training_step(backend: Backend, device: torch.device, dtype: torch.dtype) -> Step:
    """One step of DPO on a tiny Llama with float32 weights that computes in ``dtype``, on two packed groups."""
    from transformers import LlamaConfig, LlamaForCausalLM

    register_backends()
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model.to(device)
    exact_model = deepcopy(model)
    model.set_attn_implementation(backend.implementation)
    exact_model.set_attn_implementation("eager")
    policy = Policy(model, backend=backend, compute_dtype=dtype)
    groups = _groups()
    batch = build_batch(groups).to(device)
    with torch.no_grad():
        sizes = batch.cu_responses_S1.diff().tolist()
        ref_S = torch.stack([part.sum() for part in policy.logps(batch).split(sizes)])

    def packed_loss() -> torch.Tensor:
        return policy(
            batch,
            lambda hidden, head: (
                linear_dpo_loss(hidden, head.weight_VD, batch.labels_N, batch.cu_responses_S1, ref_S).loss
            ),
        )

    loss = packed_loss()
    loss.backward()
    _plain_loss(exact_model, groups, ref_S).backward()
    error = _share(_gradient(model), _gradient(exact_model))
    torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda").step()
    with torch.no_grad():
        return Step(loss.item(), error, packed_loss().item())


def _groups() -> list[PreferenceGroup]:
    generator = np.random.default_rng(0)

    def draw(size: int) -> np.ndarray:
        return generator.integers(0, _VOCABULARY, size, dtype=np.int32)

    return [PreferenceGroup(row, draw(9), (draw(12), draw(7))) for row in range(2)]


def _plain_loss(model: Any, groups: list[PreferenceGroup], ref_S: torch.Tensor) -> torch.Tensor:
    """The loss by the model's own forward, one response at a time."""
    sums = []
    for group in groups:
        for response in group.response_ids:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]).astype(np.int64)).to(model.device)
            rows = model(input_ids=ids[None], use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
            sums.append(rows.log_softmax(-1).gather(1, ids[len(group.prompt_ids) :, None]).sum())
    logps_S = torch.stack(sums)
    return preference_loss(logps_S[::2], logps_S[1::2], ref_S[::2], ref_S[1::2]).loss.mean()


def _gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _share(got: torch.Tensor, exact: torch.Tensor) -> float:
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm())
