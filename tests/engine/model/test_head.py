"""An output layer with adapters or trained copies gives the op what peft's own forward gives, gradients included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpo_kernels import linear_dpo_loss
from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import UserError
from engine.model import Policy, check_packing, load, load_policy
from engine.model.head import adapted_head, head_words, read_head
from tests.engine.model.adapter_setup import pack

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
BASE = LoraConfig(r=3, alpha=5, target_modules=("q_proj", "lm_head"))
KINDS = {
    "lora": BASE,
    "dropout": replace(BASE, dropout=0.4),
    "rslora": replace(BASE, use_rslora=True),
    "dora": replace(BASE, use_dora=True),
    "pattern": replace(BASE, target_modules=r".*(lm_head|v_proj)"),
    "copies": replace(BASE, target_modules=("q_proj",), modules_to_save=("lm_head", "embed_tokens")),
}


def adapted(model_dir, lora: LoraConfig, dtype: str = "float32") -> Policy:
    policy = load_policy(ModelConfig(model_name_or_path=str(model_dir), dtype=dtype, lora=lora), device=CPU)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.train()


def logits(policy: Policy, hidden: torch.Tensor, *, ours: bool) -> torch.Tensor:
    torch.manual_seed(2)
    if not ours:
        return policy.causal_lm.get_output_embeddings()(hidden)
    wide, head = adapted_head(policy.causal_lm, hidden)
    return torch.nn.functional.linear(wide, head.weight_VD, head.bias_V)


def results(policy: Policy, hidden: torch.Tensor, *, ours: bool) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of everything that leads to them."""
    hidden = hidden.clone().requires_grad_()
    out = logits(policy, hidden, ours=ours)
    policy.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return {"logits": out.detach(), "hidden": hidden.grad, **grads}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(kind, tiny_model_dir):
    policy = adapted(tiny_model_dir, KINDS[kind]).double()
    torch.manual_seed(0)
    hidden = torch.randn(9, 32, dtype=torch.float64)
    got, want = (results(policy, hidden, ours=ours) for ours in (True, False))
    assert got.keys() == want.keys()
    assert len(got) >= 3
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)
    with policy.reference_mode():
        assert torch.equal(logits(policy, hidden, ours=True), hidden @ read_head(policy.causal_lm).weight_VD.T)
        torch.testing.assert_close(logits(policy, hidden, ours=True), logits(policy, hidden, ours=False))


@pytest.mark.parametrize("kind", ["lora", "dora", "copies"])
def test_a_layer_that_scales_its_rows_is_one_product(kind, tiny_model_dir, monkeypatch):
    """Its own forward, around which peft has its adapters, is what the loss has to reproduce."""

    class Scaled(torch.nn.Linear):
        def __init__(self, plain: torch.nn.Linear):
            super().__init__(plain.in_features, plain.out_features, bias=False)
            self.load_state_dict(plain.state_dict())
            self.factor = torch.nn.Parameter(torch.linspace(0.5, 2.0, plain.out_features))

        def forward(self, hidden):
            return super().forward(hidden) * self.factor.to(hidden.dtype)

    read = load.read_causal_lm

    def with_scaled_head(*args, **kwargs):
        model = read(*args, **kwargs)
        model.set_output_embeddings(Scaled(model.get_output_embeddings()))
        return model

    monkeypatch.setattr(load, "read_causal_lm", with_scaled_head)
    policy = adapted(tiny_model_dir, KINDS[kind]).double()
    torch.manual_seed(0)
    hidden = torch.randn(9, 32, dtype=torch.float64)
    got, want = (results(policy, hidden, ours=ours) for ours in (True, False))
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)
    policy.compute_dtype = torch.float32
    check_packing(policy.float().eval())
    assert policy.layout.kind == "shared"


@pytest.mark.parametrize("kind", ["lora", "dora", "copies"])
def test_in_bfloat16_the_error_is_at_most_twice_that_of_peft(kind, tiny_model_dir):
    policy = adapted(tiny_model_dir, KINDS[kind], "bfloat16")
    torch.manual_seed(0)
    hidden = torch.randn(40, 32).bfloat16()
    with policy.autocast():
        got, peers = (results(policy, hidden, ours=ours) for ours in (True, False))
    exact = results(policy.double(), hidden.double(), ours=False)
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        ours, theirs = ((found[name].double() - want).norm() for found in (got, peers))
        assert ours <= 2 * theirs, name


def test_an_update_smaller_than_the_digits_of_the_weight_counts(tiny_model_dir):
    """Added to a weight of 16 bits it would be rounded away."""
    policy = adapted(tiny_model_dir, BASE, "bfloat16")
    layer = policy.causal_lm.get_output_embeddings()
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.fill_(1e-3)
        layer.lora_B["default"].weight.fill_(1e-2)
    hidden = torch.ones(1, 32, dtype=torch.bfloat16)
    with policy.autocast():
        wide, head = adapted_head(policy.causal_lm, hidden)
    update = (wide[:, 32:].double() @ head.weight_VD[:, 32:].double().T)[0, 0].item()
    assert update == pytest.approx(5 / 3 * 3 * 32 * 1e-5, rel=1e-2)


def test_what_cannot_be_one_product_is_refused(tiny_model_dir):
    with pytest.raises(UserError, match=r"use_dora with dropout on the output layer .* model.lora.dropout to 0"):
        adapted(tiny_model_dir, replace(BASE, use_dora=True, dropout=0.1))
    with pytest.raises(UserError, match=r"model.lora.modules_to_save: no layer .* is called ln_head; did you mean lm_"):
        adapted(tiny_model_dir, replace(BASE, modules_to_save=("ln_head",)))


def test_trained_copies_compute_in_float32_and_give_what_their_originals_do(tiny_model_dir):
    lora = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head", "embed_tokens", "norm"))
    config = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="bfloat16", lora=lora)
    policy = load_policy(config, device=CPU).eval()
    trained = {name: p.dtype for name, p in policy.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    # peft takes the names as ends of names: every norm but those in attention
    assert sum("modules_to_save" in name for name in trained) == 2 + 1 + 2 * 2
    policy.causal_lm.set_attn_implementation("eager")
    ids = torch.arange(12)[None]
    with torch.no_grad(), policy.autocast():
        got = policy.causal_lm(input_ids=ids, output_hidden_states=True).hidden_states
        with policy.reference_mode():
            want = policy.causal_lm(input_ids=ids, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, got, want))


def test_what_is_trained_of_the_head_is_said(tiny_model_dir):
    words = [head_words(adapted(tiny_model_dir, KINDS[kind]).causal_lm) for kind in ("lora", "copies")]
    assert words[0] == "frozen, with adapters of rank 3"
    assert "trained copy" in words[1]
    assert head_words(adapted(tiny_model_dir, replace(BASE, target_modules=("q_proj",))).causal_lm) == "frozen"


def test_a_frozen_head_has_no_gradient_of_its_weight(tiny_model_dir):
    """LoRA takes the path with two products: no pass makes a tensor of the shape of the head's weight."""
    base = ModelConfig(model_name_or_path=str(tiny_model_dir), dtype="float32")
    policy = load_policy(replace(base, lora=LoraConfig(r=4)), device=CPU)
    batch, head = pack(), policy.head
    assert not head.weight_VD.requires_grad
    shape = head.weight_VD.shape
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            fresh = out if isinstance(out, torch.Tensor) else None
            if (
                fresh is not None
                and fresh.shape in (shape, shape[::-1])
                and fresh.data_ptr() != head.weight_VD.data_ptr()
            ):
                made.append(func)
            return out

    def loss(hidden, head):
        refs = torch.zeros(batch.num_responses)
        return linear_dpo_loss(
            hidden, head.weight_VD, batch.labels_N, batch.cu_responses_S1, refs, reduction="sum", **head.options
        ).loss

    with Watch():
        policy(batch, loss).backward()
    assert not made
    assert head.weight_VD.grad is None
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    full = load_policy(base, device=CPU)
    head = full.head
    with Watch():
        full(batch, loss).backward()
    assert made, "the watch sees the gradient of a trained head"
