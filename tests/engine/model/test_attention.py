"""Packs give what single sequences give, for every family, and no token sees another response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.data.groups import PreferenceGroup
from engine.errors import UserError
from engine.model.attention import Backend, choose_backend, register_backends
from engine.model.checks import check_packing, has_experts
from engine.model.load import disable_dropout
from engine.model.policy import Policy
from engine.packing import build_batch
from tests.engine.model.families import FAMILIES, VOCAB, tiny_model

SDPA = Backend("sdpa", "test")


def make_policy(model: torch.nn.Module, compute_dtype: torch.dtype = torch.float32) -> Policy:
    register_backends()
    disable_dropout(model)
    model.set_attn_implementation(SDPA.implementation)
    return Policy(model, backend=SDPA, compute_dtype=compute_dtype)


def random_groups(seed: int = 0) -> list[PreferenceGroup]:
    """Prompt and completion lengths of 1, more than two responses, sequences longer than the sliding window."""
    draw = np.random.default_rng(seed).integers
    shapes = [(9, (12, 7)), (1, (3, 14)), (5, (1, 6, 2)), (13, (4, 1))]
    return [
        PreferenceGroup(
            row=row,
            prompt_ids=draw(3, VOCAB, prompt, dtype=np.int32),
            response_ids=tuple(draw(3, VOCAB, n, dtype=np.int32) for n in responses),
        )
        for row, (prompt, responses) in enumerate(shapes)
    ]


def one_by_one(model: torch.nn.Module, groups: list[PreferenceGroup]) -> list[torch.Tensor]:
    """Log-probs of each response from the model's own eager forward."""
    model.set_attn_implementation("eager")
    result = []
    for group in groups:
        for response in group.response_ids:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, response])).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            rows = logits[len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            result.append(rows.gather(1, ids[len(group.prompt_ids) :, None])[:, 0])
    return result


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logps_and_gradients_equal_one_by_one(family, share_prompts):
    groups = random_groups()
    model = tiny_model(family)
    disable_dropout(model)
    expected = one_by_one(model, groups)
    weights = [torch.randn(len(e), generator=torch.Generator().manual_seed(i)) for i, e in enumerate(expected)]
    sum((w * e).sum() for w, e in zip(weights, expected, strict=True)).backward()
    expected_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    policy = make_policy(model)
    batch = build_batch(groups, share_prompts=share_prompts)
    logps = policy.logps(batch)
    (torch.cat(weights) * logps).sum().backward()

    pieces = logps.detach().split(batch.cu_responses_S1.diff().tolist())
    for got, want in zip(pieces, expected, strict=True):
        assert abs(got.sum() - want.sum()) < 1e-4
        torch.testing.assert_close(got, want.detach(), atol=2e-5, rtol=1e-5)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected_grads.keys()
    for name, want in expected_grads.items():
        torch.testing.assert_close(grads[name], want, atol=1e-4 * max(1.0, want.abs().max().item()), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_perturbing_a_response_changes_no_bit_of_another(family):
    policy = make_policy(tiny_model(family))
    groups = random_groups()
    index = 0
    # Another token's route changes the shapes of the experts' matrix products, and with them the last bit.
    experts = has_experts(policy.config)
    with torch.no_grad():
        batch = build_batch(groups)
        before = policy.logps(batch).split(batch.cu_responses_S1.diff().tolist())
        for g, group in enumerate(groups):
            for k in range(len(group.response_ids)):
                responses = list(group.response_ids)
                responses[k] = (responses[k] + 1) % VOCAB
                changed = [*groups[:g], replace(group, response_ids=tuple(responses)), *groups[g + 1 :]]
                after = policy.logps(build_batch(changed)).split(batch.cu_responses_S1.diff().tolist())
                for s, (a, b) in enumerate(zip(before, after, strict=True)):
                    same = torch.allclose(a, b, atol=1e-5) if experts else torch.equal(a, b)
                    assert same == (s != index), (g, k, s)
                index += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_start_up_check_accepts(family):
    model = tiny_model(family)
    policy = make_policy(model)
    check_packing(policy)
    assert model.config._attn_implementation == SDPA.implementation


@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt", "stablelm"])
def test_start_up_check_refuses_packs_by_name(family):
    overrides = {"falcon": {"head_dim": None}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}}
    model = tiny_model(family, **overrides.get(family, {}))
    with pytest.raises((UserError, ValueError), match=r"(?i)" + family) as found:
        check_packing(make_policy(model), requested="shared")
    # It is in float32 already.
    assert "float32" not in str(found.value)


def test_gradient_checkpointing_keeps_the_plan():
    groups = random_groups()
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = make_policy(model)
        policy.logps(build_batch(groups)).sum().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)


def test_runs_are_bitwise_equal():
    groups = random_groups()
    policy = make_policy(tiny_model("llama"))
    results = []
    for _ in range(2):
        policy.zero_grad()
        policy.logps(build_batch(groups)).sum().backward()
        results.append([p.grad.clone() for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backend_choice_is_explicit():
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.float64).name == "sdpa"
    assert "CUDA" in choose_backend("auto", cpu, torch.bfloat16).reason
    with pytest.raises(UserError, match=r"model\.attention=varlen cannot run here: a CUDA device is needed"):
        choose_backend("varlen", cpu, torch.bfloat16)
    cuda = torch.device("cuda")
    assert "compute dtype is float32" in choose_backend("auto", cuda, torch.float32).reason
