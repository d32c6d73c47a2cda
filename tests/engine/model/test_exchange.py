"""Attention and the head of a pack on several ranks against the same on one, with gradients, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_kernels import native
from engine.config.schema import ModelConfig
from engine.data.groups import PreferenceGroup
from engine.errors import UserError
from engine.model import load_policy, offload
from engine.model.attention import packed_attention
from engine.model.offload import OffloadedActivations
from engine.packing import build_batch
from engine.packing.slices import width
from tests.engine.distributed.ranks import Ranks

HEADS, DIM, VALUE_DIM = 4, 8, 6


def groups() -> list[PreferenceGroup]:
    """The first prompt is so long that some rank has no completion token of its own."""
    draw = np.random.default_rng(0).integers
    shapes = [(30, (2, 1)), (5, (3, 4)), (9, (1, 2))]
    return [
        PreferenceGroup(row, draw(1, 50, p, dtype=np.int32), tuple(draw(1, 50, r, dtype=np.int32) for r in responses))
        for row, (p, responses) in enumerate(shapes)
    ]


def attend(batch, tensors: list[torch.Tensor], **options) -> torch.Tensor:
    module = SimpleNamespace(config=SimpleNamespace())
    query, key, value, sinks = tensors
    output, _ = packed_attention(
        ("sdpa",), module, query, key, value, attention_plan=batch.plan, s_aux=sinks, **options
    )
    return output


@pytest.mark.parametrize(("ranks", "key_heads"), [(2, 4), (2, 2), (2, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"sliding_window": 4}, {"softcap": 2.0}], ids=str)
def test_attention_of_several_ranks_is_that_of_one(ranks, key_heads, options, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    whole = build_batch(groups())
    tokens = whole.num_tokens

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [draw(1, HEADS, tokens, DIM), draw(1, key_heads, tokens, DIM), draw(1, key_heads, tokens, VALUE_DIM)]
    sinks = draw(HEADS) if options.get("sinks") else None
    given = {name: value for name, value in options.items() if name != "sinks"}
    slope = draw(1, tokens, HEADS, VALUE_DIM)
    leaves = [x.clone().requires_grad_() for x in (*inputs, *([] if sinks is None else [sinks]))]
    output = attend(whole, [*leaves, *([None] if sinks is None else [])], **given)
    (output * slope).sum().backward()
    team = Ranks(ranks, monkeypatch)
    size = width(tokens, ranks)

    def work(rank: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        place = slice(rank * size, (rank + 1) * size)
        own = [torch.zeros(*x.shape[:2], size, x.shape[3], dtype=x.dtype) for x in inputs]
        for part, x in zip(own, inputs, strict=True):
            part[:, :, : x[:, :, place].shape[2]] = x[:, :, place]
        own_leaves = [x.requires_grad_() for x in (*own, *([] if sinks is None else [sinks.clone()]))]
        found = attend(build_batch(groups()), [*own_leaves, *([None] if sinks is None else [])], **given)
        assert found.shape == (1, size, HEADS, VALUE_DIM)
        kept = slope[:, place]
        (found[:, : kept.shape[1]] * kept).sum().backward()
        return found.detach(), [x.grad for x in own_leaves]

    parts = team.run(work)
    assert torch.allclose(torch.cat([found for found, _ in parts], 1)[:, :tokens], output, rtol=0, atol=1e-12)
    for i, leaf in enumerate(leaves):
        grads = [grads[i] for _, grads in parts]
        # Sinks lie on every rank, and the sum over ranks is theirs.
        joined = torch.stack(grads).sum(0) if leaf.ndim == 1 else torch.cat(grads, 2)[:, :, :tokens]
        assert torch.allclose(joined, leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_token_is_collected_once_with_its_gradient(ranks, monkeypatch):
    whole = build_batch(groups())
    hidden = torch.arange(whole.num_tokens, dtype=torch.float64)
    wanted = hidden[whole.rows_N]
    slope = torch.randn(len(wanted), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros_like(hidden).index_add(0, whole.rows_N, slope)
    team = Ranks(ranks, monkeypatch)

    def work(rank: int):
        batch = build_batch(groups())
        size = batch.own.num_tokens
        own = torch.zeros(size, dtype=torch.float64)
        part = hidden[rank * size : (rank + 1) * size]
        own[: len(part)] = part
        own.requires_grad_()
        found = batch.collect(batch.gather_predicting(own[:, None])[:, 0])
        (found * slope).sum().backward()
        assert batch.own_labels.shape == batch.own.rows_M.shape
        return found.detach(), own.grad, batch.own.input_ids_L, len(batch.own.places_M)

    parts = team.run(work)
    assert all(torch.equal(found, wanted) for found, *_ in parts)
    assert torch.allclose(torch.cat([p[1] for p in parts])[: len(hidden)], expected, rtol=0, atol=1e-15)
    assert torch.equal(torch.cat([p[2] for p in parts])[: len(hidden)], whole.input_ids_T)
    assert min(p[3] for p in parts) == 0


def test_heads_that_cannot_be_divided_are_refused(monkeypatch):
    team = Ranks(3, monkeypatch)
    query = torch.zeros(1, HEADS, 25, DIM)

    def work(rank: int) -> torch.Tensor:
        return attend(build_batch(groups()), [query, query, query, None])

    with pytest.raises(UserError, match=r"train.context_parallel=3 divides the attention heads, and the model has 4: "):
        team.run(work)


@pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
def test_what_attention_keeps_of_a_whole_pack_waits_on_the_host(tiny_model_dir, monkeypatch):
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32", attention="native")
    policy = load_policy(model, device=torch.device("cpu")).train()
    policy.activation_offload = True
    whole, pack_one = build_batch(groups()).num_tokens, OffloadedActivations._pack
    moved: list[bool] = []

    def record(self, tensor):
        packed = pack_one(self, tensor)
        if whole in tensor.shape:
            moved.append(packed is not tensor)
        return packed

    monkeypatch.setattr(OffloadedActivations, "_pack", record)
    monkeypatch.setattr(offload, "SMALLEST", 1)
    Ranks(2, monkeypatch).run(lambda rank: policy.logps(build_batch(groups())))
    assert len(moved) >= 2 * 3 * policy.config.num_hidden_layers
    assert all(moved)
