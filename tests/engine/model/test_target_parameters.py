"""Adapters on stacked experts, which are no layers: as peft has them, in packs, continued, merged and resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config.schema import LoraConfig, ModelConfig
from engine.errors import UserError
from engine.merge import merge
from engine.model import check_packing, load_adapter, load_policy
from engine.train.checkpoint import save_weights
from tests.engine.model.adapter_setup import disturb_, pack
from tests.engine.model.test_adapters import plain_logps

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
FORMS = {
    "alone": LoraConfig(r=2, target_modules=(), target_parameters=EXPERTS),
    "beside layers and the head": LoraConfig(
        r=2, alpha=6, target_modules=("q_proj", "lm_head"), target_parameters=EXPERTS[:1], use_rslora=True
    ),
}
MOVED = 3e-4
"""Rounding of float32 in experts whose matrices have other shapes in a pack."""


@pytest.fixture
def base(tiny_mixture_dir) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(tiny_mixture_dir), dtype="float32")


def plain(base: ModelConfig):
    return AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_log_probs_and_gradients_are_those_of_peft_alone(form, base, tmp_path):
    """Saved, loaded by peft, continued beside a frozen copy, put on a whole model, and merged."""
    policy = load_policy(replace(base, lora=FORMS[form]), device=CPU)
    check_packing(policy)
    batch = pack()
    with torch.no_grad():
        unadapted = policy.logps(batch)
    disturb_(policy)
    save_weights(policy, tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(plain(base), tmp_path / "saved", is_trainable=True).eval()
    weights_N = torch.linspace(-1, 1, len(unadapted))
    for logps_N in ((got := policy.eval().logps(batch)), (want := plain_logps(loaded, batch))):
        (logps_N * weights_N).sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=MOVED)
    assert (got - unadapted).abs().max() > 1e-2
    grads = {name: p.grad for name, p in loaded.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert grads.keys() == ours.keys()
    assert sum("experts" in name for name in ours) == 4 * len(FORMS[form].target_parameters)
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item() + 1e-6)
    on_top = load_policy(base, device=CPU)
    load_adapter(on_top, tmp_path / "saved")
    merged = AutoModelForCausalLM.from_pretrained(merge(str(tmp_path / "saved")).folder, dtype=torch.float32)
    with torch.no_grad():
        with policy.reference_mode():
            torch.testing.assert_close(policy.logps(batch), unadapted, rtol=0, atol=0)
        torch.testing.assert_close(on_top.eval().logps(batch), got, rtol=0, atol=1e-5)
        torch.testing.assert_close(plain_logps(merged, batch), want, rtol=0, atol=MOVED)
        went_on = load_policy(replace(base, adapter_name_or_path=str(tmp_path / "saved")), device=CPU)
        torch.testing.assert_close(went_on.eval().logps(batch), got, rtol=0, atol=1e-5)
        disturb_(went_on)
        assert (went_on.logps(batch) - got).abs().max() > 1e-3
        with went_on.reference_mode():
            torch.testing.assert_close(went_on.logps(batch), got, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("experts.gate_up_prj",), r"is called experts\.gate_up_prj; did you mean mlp\.experts\.gate_up_proj\?"),
        (
            (*EXPERTS, "w1"),
            r"is called w1; its stacked experts are mlp\.experts\.down_proj, mlp\.experts\.gate_up_proj",
        ),
        (
            ("q_proj.weight",),
            r"q_proj\.weight is the weight of a layer: name model\.layers\.0\.self_attn\.q_proj in mod",
        ),
        (("lm_head.weight",), r"lm_head\.weight is the weight of a layer: name lm_head in"),
        (("embed_tokens.weight",), r"embed_tokens\.weight is the weight of a layer"),
    ],
)
def test_a_wrong_name_is_one_line(targets, message, base):
    with pytest.raises(UserError, match=r"^model\.lora\.target_parameters: .*" + message):
        load_policy(replace(base, lora=LoraConfig(r=2, target_parameters=targets)), device=CPU)


def test_a_model_without_stacked_experts_and_an_old_peft_say_so(base, tiny_model_dir, monkeypatch):
    lora = LoraConfig(r=2, target_parameters=EXPERTS)
    with pytest.raises(UserError, match=r"it has no stacked experts$"):
        load_policy(replace(base, model_name_or_path=str(tiny_model_dir), lora=lora), device=CPU)
    fields = {name: f for name, f in peft.LoraConfig.__dataclass_fields__.items() if name != "target_parameters"}
    monkeypatch.setattr(peft.LoraConfig, "__dataclass_fields__", fields)
    with pytest.raises(UserError, match=r"target_parameters needs a newer peft than .*: pip install -U 'peft>=0\.18'"):
        load_policy(replace(base, lora=lora), device=CPU)


def test_a_peft_that_holds_no_second_adapter_on_parameters_is_said(base, tmp_path, monkeypatch):
    save_weights(load_policy(replace(base, lora=FORMS["alone"]), device=CPU), tmp_path / "saved")

    def one_alone(*_, **__):
        raise ValueError("only one LoRA adapter per model with `target_parameters` is allowed")

    monkeypatch.setattr(peft.PeftModel, "add_adapter", one_alone)
    monkeypatch.setattr(peft.PeftModelForCausalLM, "add_adapter", one_alone)
    with pytest.raises(UserError, match=r"holds one adapter on single parameters, .*: pip install -U peft, or merge"):
        load_policy(replace(base, adapter_name_or_path=str(tmp_path / "saved")), device=CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, r"model\.lora\.dropout does not work on model\.lora\.target_parameters: set it to 0"),
        ({"use_dora": True}, r"model\.lora\.use_dora does not work on model\.lora\.target_parameters: set it to false"),
        (
            {"target_parameters": (), "target_modules": ()},
            r"target_modules must not be empty without model\.lora\.targ",
        ),
    ],
)
def test_what_does_not_go_with_parameters_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"target_parameters": EXPERTS, **options})
