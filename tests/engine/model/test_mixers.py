"""Modules and whole models in rows train as one response at a time does."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from engine.config.schema import LoraConfig, LossConfig, ModelConfig
from engine.data.groups import PreferenceDataset
from engine.errors import UserError
from engine.model import Policy, check_packing, load_policy
from engine.model.layouts import attention_name, describe_layout, eager_attention, use_layout
from engine.model.mixers import put_in_rows
from engine.model.policy import Layout
from engine.packing import build_batch
from engine.reference import ReferenceStore, load_ref_sums, model_digest, precompute, verify_rows
from engine.train.objective import Objective
from engine.train.references import ReferenceTable, check_first_loss
from tests.conformance.families import tiny_config, tiny_model
from tests.conformance.trial import GRAD_BOUND, LOGPS_BOUND, one_by_one, sample_groups

CPU = torch.device("cpu")
HYBRID, IN_ROWS = "qwen3_next", "bloom"


@pytest.fixture(scope="module", params=[HYBRID, IN_ROWS])
def saved(request, tmp_path_factory):
    """A model in a folder, and what it gives one response at a time."""
    model = tiny_model(tiny_config(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, str(folder), one_by_one(model, sample_groups())


def test_adapters_on_the_head_of_a_model_in_rows(tmp_path):
    """Against the shared layout, in float64."""
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    lora = LoraConfig(r=2, target_modules=("q_proj", "lm_head"))
    policy = load_policy(ModelConfig(model_name_or_path=str(tmp_path), dtype="float32", lora=lora), device=CPU).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    want_logps, want = backward(policy, [build_batch(sample_groups())])
    use_layout(policy, Layout("rows"))
    logps, grads = backward(policy, [build_batch(sample_groups(), share_prompts=False)])
    torch.testing.assert_close(logps, want_logps, rtol=0, atol=1e-5)
    assert any("lm_head" in name and grad.abs().max() > 0 for name, grad in grads.items())
    assert grads.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-5 * grad.abs().max().item())


def load(folder: str, **options) -> Policy:
    model = ModelConfig(model_name_or_path=folder, dtype="float32", lora=options.pop("lora", None))
    policy = load_policy(model, device=CPU, **options)
    check_packing(policy)
    return policy


@pytest.mark.parametrize("hidden_size", [32, 64])
def test_a_mixer_is_found_whose_part_is_small(hidden_size, tmp_path):
    """As transformers initialises a model: what a convolution adds is a thousandth of what the checks call rounding."""
    from transformers import AutoModelForCausalLM, Lfm2Config

    sizes = {"hidden_size": hidden_size, "intermediate_size": 64, "vocab_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention", "conv"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load(str(tmp_path))
    assert policy.layout.kind == "mixers"
    assert policy.layout.mixers == ("Lfm2ShortConv",)


def backward(policy: Policy, batches) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and gradients of a weighted sum of them; all forward passes come before the first backward pass."""
    policy.train()
    policy.zero_grad()
    parts = [policy.logps(batch) for batch in batches]
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(sum(map(len, parts)), generator=generator).split([len(part) for part in parts])
    for part, weight in zip(parts, weights, strict=True):
        (weight * part).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return torch.cat(parts).detach(), grads


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_as_one_response_at_a_time(saved, checkpointing, offload, share):
    family, folder, expected = saved
    policy = load(folder, gradient_checkpointing=checkpointing)
    policy.activation_offload = offload
    assert policy.layout.kind == {HYBRID: "mixers", IN_ROWS: "rows"}[family]
    logps, grads = backward(policy, [build_batch([group], share_prompts=share) for group in sample_groups()])
    assert (logps - expected.logps_N).abs().max() <= LOGPS_BOUND
    for name, want in expected.grads.items():
        error = (grads[f"model.{name}"] - want).abs().max()
        assert error <= GRAD_BOUND * max(1.0, want.abs().max().item()), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_inside(saved, checkpointing):
    """Against the same adapters with no module wrapped and one response a pack."""
    family, folder, _ = saved
    policy = load(folder, lora=LoraConfig(r=2), gradient_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    inside = "linear_attn" if family == HYBRID else "self_attention"
    logps, grads = backward(policy, [build_batch(sample_groups())])
    assert any(inside in name and grad.abs().max() > 0 for name, grad in grads.items())
    alone = deepcopy(policy)
    use_layout(alone, Layout("single"))
    want_logps, want = backward(alone, [build_batch(sample_groups())])
    assert (logps - want_logps).abs().max() <= LOGPS_BOUND
    assert grads.keys() == want.keys()
    for name, grad in want.items():
        assert (grads[name] - grad).abs().max() <= GRAD_BOUND * max(1.0, grad.abs().max().item()), name


def test_what_is_stored_of_a_model_in_rows_is_found_again(tmp_path):
    """Of each response by itself: these logits depend on how many tokens there are behind them."""
    model = tiny_model(tiny_config("prophetnet"))
    model.save_pretrained(tmp_path / "model")
    policy = load(str(tmp_path / "model"))
    assert policy.layout.kind == "single"
    groups = sample_groups()
    dataset = PreferenceDataset(groups)
    sizes = [len(ids) for group in groups for ids in group.response_ids]
    logps = iter(one_by_one(model, groups).logps_N.split(sizes))
    verify_rows(policy, dataset, [tuple(next(logps).numpy() for _ in group.response_ids) for group in groups])
    store = ReferenceStore(tmp_path / "store")
    precompute(policy, dataset, store, tokens_per_pack=200, progress=False)
    objective = Objective(LossConfig())
    table = ReferenceTable(load_ref_sums(dataset, store, model_digest(policy)))
    assert check_first_loss(policy, dataset, table, objective) == pytest.approx(math.log(2), abs=1e-6)


def test_bfloat16_is_as_near_as_the_model_alone(saved):
    _, folder, expected = saved
    model = ModelConfig(model_name_or_path=folder, dtype="bfloat16")
    policy = load_policy(model, device=CPU)
    check_packing(policy)
    alone = deepcopy(policy)
    use_layout(alone, Layout("single"))
    batch = build_batch(sample_groups())
    with torch.no_grad():
        error, own = ((p.logps(batch) - expected.logps_N).abs().max() for p in (policy, alone))
    assert error <= 2 * own


def test_a_copy_is_wrapped_around_its_own_weights(saved):
    _, folder, expected = saved
    policy = load(folder)
    copied = deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        logps = copied.logps(build_batch(sample_groups()))
    assert (logps - expected.logps_N).abs().max() <= LOGPS_BOUND


def test_a_plain_forward_is_left_alone_and_unwrapping_leaves_nothing(saved):
    family, folder, _ = saved
    if family != HYBRID:
        pytest.skip("nothing is wrapped")
    policy = load(folder)
    wrapped = [m for m in policy.causal_lm.modules() if "forward" in vars(m)]
    assert [type(m).__name__ for m in wrapped] == 2 * ["Qwen3NextGatedDeltaNet"]
    ids = torch.arange(8, 30)[None]
    with torch.no_grad(), eager_attention(policy):
        before = policy.plain_logits(ids)
        put_in_rows(policy.causal_lm, ())
        assert torch.equal(policy.plain_logits(ids), before)
    assert not [m for m in policy.causal_lm.modules() if "forward" in vars(m)]


def test_what_was_chosen_is_said(saved):
    family, folder, _ = saved
    policy = load(folder)
    words, attention = describe_layout(policy), attention_name(policy)
    if family == HYBRID:
        assert words.startswith("packs, mixers in rows: Qwen3NextGatedDeltaNet x 2 (Qwen3NextForCausalLM leaks tokens")
        assert attention == policy.backend.name
    else:
        assert words.startswith("rows: padded, the whole model (BloomForCausalLM leaks tokens")
        assert attention == "own eager"


def test_a_layout_that_is_asked_for_is_taken_or_refused(saved):
    family, folder, _ = saved
    policy = load_policy(ModelConfig(model_name_or_path=folder, dtype="float32"), device=CPU)
    if family == HYBRID:
        check_packing(policy, requested="shared")
        assert policy.layout.kind == "mixers"
    else:
        with pytest.raises(UserError, match=r"\(BloomAttention\).*; set packing\.layout to auto, or choose a family"):
            check_packing(policy, requested="shared")
    check_packing(policy, requested="rows")
    assert policy.layout == Layout("rows", (), "packing.layout asks for it")
