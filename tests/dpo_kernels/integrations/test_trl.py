"""TRL's trainer with our head against TRL's own: losses, gradients, metrics, training; and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import inspect

import pytest
import torch
from torch.testing import assert_close

from dpo_kernels.integrations import versions
from tests.dpo_kernels.integrations.trl_setup import disturb_, make_trainer
from tests.engine.model.families import VOCAB, tiny_model

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
trl_utils = pytest.importorskip("trl.trainer.utils")
integration = pytest.importorskip("dpo_kernels.integrations.trl")
DPOTrainer, FusedDPOTrainer = trl.DPOTrainer, integration.FusedDPOTrainer
trl_head, add_fused_lm_head = trl_utils.add_fused_lm_head, integration.add_fused_lm_head

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MOE = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
MLP_LORA = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def step(trainer):
    """Loss, gradient of every parameter, and metrics of one batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return loss.detach(), grads, dict(trainer._metrics["train"])


def assert_same_step(tmp_path, family="llama", **options):
    """Run one batch through both trainers and compare everything."""
    loss, grads, metrics = step(make_trainer(FusedDPOTrainer, tmp_path / "ours", family, **copy.deepcopy(options)))
    want_loss, want_grads, want_metrics = step(make_trainer(DPOTrainer, tmp_path / "theirs", family, **options))
    assert_close(loss, want_loss, **TOLERANCE)
    assert grads.keys() == want_grads.keys()
    assert any(grad is not None and grad.any() for grad in grads.values())
    for name, want in want_grads.items():
        assert (grads[name] is None) == (want is None), name
        if want is not None:
            assert_close(grads[name], want, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    assert metrics.keys() == want_metrics.keys()
    for name, want in want_metrics.items():
        assert metrics[name] == pytest.approx(want, rel=1e-5, abs=1e-5), name
    return metrics


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "granite", "phi"])
def test_full_fine_tuning(tmp_path, family):
    metrics = assert_same_step(tmp_path, family)
    assert {"entropy", "mean_token_accuracy", "logits/chosen", "rewards/margins", "logps/rejected"} <= metrics.keys()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora(tmp_path, family):
    assert_same_step(tmp_path, family, peft_config=peft.LoraConfig(**MLP_LORA))


def test_lora_with_trained_copy_of_the_head(tmp_path):
    assert_same_step(tmp_path, peft_config=peft.LoraConfig(**MLP_LORA, modules_to_save=["lm_head"]))


def test_virtual_tokens(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_same_step(tmp_path, peft_config=config)


@pytest.mark.parametrize("peft_config", [None, MLP_LORA], ids=["full", "lora"])
def test_mixture_of_experts(tmp_path, peft_config):
    config = peft_config and peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    metrics = assert_same_step(tmp_path, "mixtral", model_options=MOE, peft_config=config)
    assert metrics["aux_loss"][0] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": ["hinge"]},
        {"loss_type": ["aot"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5]},
        {"loss_type": ["sigmoid_norm"], "ld_alpha": 0.5},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"gradient_checkpointing": True},
        {"precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_options_of_trl(tmp_path, options):
    assert_same_step(tmp_path, **options)


def test_training_run(tmp_path):
    runs = {}
    for trainer_class in (FusedDPOTrainer, DPOTrainer):
        torch.manual_seed(0)
        trainer = make_trainer(trainer_class, tmp_path / trainer_class.__name__, max_steps=3, eval_strategy="no")
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
        runs[trainer_class] = rows, weights, trainer.evaluate(trainer.train_dataset)
    (rows, weights, scores), (want_rows, want_weights, want_scores) = runs.values()
    assert len(rows) == 3
    assert rows[0]["loss"] != rows[2]["loss"]
    for row, want in zip([*rows, scores], [*want_rows, want_scores], strict=True):
        assert row.keys() == want.keys()
        for name in want:
            if not name.endswith(("runtime", "per_second")):
                assert row[name] == pytest.approx(want[name], rel=1e-4, abs=1e-4), name
    assert_close(weights, want_weights, rtol=1e-4, atol=1e-4)


def test_autocast_reaches_both_heads(tmp_path):
    """A reference equal to the policy gives rewards of exactly 0 only if both heads run in the same precision."""
    trainer = make_trainer(FusedDPOTrainer, tmp_path, bf16=True, max_steps=1, distance=0.0)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["rewards/chosen"] == row["rewards/rejected"] == 0
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-6)
    exact = make_trainer(FusedDPOTrainer, tmp_path, max_steps=1, distance=0.0)
    exact.train()
    assert 0 < abs(row["logps/chosen"] - exact.state.log_history[0]["logps/chosen"]) < 0.1


class Scored:
    """One forward of a model with a head; the sum of its log-probs, weighted unevenly, is differentiated."""

    def __init__(self, add_head, family="llama", *, call=None, dtype=torch.float32, model_options=None, **head_options):
        model = tiny_model(family, **(model_options or {})).to(dtype)
        add_head(model, outputs=ALL, **head_options)
        ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[0, :4], labels[1, 7:] = -100, -100
        arguments = {"labels": labels} if call is None else call(labels)
        self.out = model(input_ids=ids, fused_lm_head=True, **arguments)
        coefficients = torch.linspace(-1, 1, self.out.log_probs.numel()).view_as(self.out.log_probs)
        (self.out.loss + (self.out.log_probs * coefficients).sum()).backward()
        self.grads = {name: p.grad for name, p in model.named_parameters()}


def assert_same_output(**options):
    ours, theirs = Scored(add_fused_lm_head, **options), Scored(trl_head, **options)
    assert isinstance(ours.out, trl_utils.FusedCausalLMOutput)
    assert ours.out.keys() == theirs.out.keys()
    for name, want in theirs.out.items():
        assert ours.out[name].dtype == want.dtype, name
        assert_close(ours.out[name], want, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    for name, want in theirs.grads.items():
        assert_close(ours.grads[name], want, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def _labels_and_count(labels):
    return {"labels": labels, "num_items_in_batch": 40}


def _shifted_labels(labels):
    return {"shift_labels": labels.roll(-1, 1)}


def _shifted_labels_and_count(labels):
    return {"shift_labels": labels.roll(-1, 1), "num_items_in_batch": torch.tensor(9)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"family": "gemma2", "temperature": 1.7},
        {"family": "cohere"},
        {"family": "phi"},
        {"family": "mixtral", "model_options": MOE},
        {"family": "gpt_oss", "model_options": MOE},
        {"call": _labels_and_count},
        {"call": _shifted_labels},
        {"call": _shifted_labels_and_count},
    ],
    ids=lambda case: "-".join(str(v) if k != "call" else v.__name__ for k, v in case.items()),
)
def test_output(options):
    assert_same_output(**options)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_loss_is_that_of_the_model(family):
    options = {"model_options": MOE} if family == "mixtral" else {}
    model = tiny_model(family, **options.get("model_options", {}))
    ids = torch.randint(3, VOCAB, (2, 11))
    want = model(input_ids=ids, labels=ids)
    add_fused_lm_head(model)
    assert_close(model(input_ids=ids, labels=ids, fused_lm_head=True).loss, want.loss, **TOLERANCE)


def test_head_in_float32_under_autocast_and_half_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = Scored(add_fused_lm_head, cast_lm_head_to_fp32=True)
        theirs = Scored(trl_head, cast_lm_head_to_fp32=True)
    assert_close(ours.out.log_probs, theirs.out.log_probs, **TOLERANCE)
    ours = Scored(add_fused_lm_head, cast_lm_head_to_fp32=True, dtype=torch.bfloat16)
    theirs = Scored(trl_head, cast_lm_head_to_fp32=True, dtype=torch.bfloat16)
    assert_close(ours.out.log_probs, theirs.out.log_probs, **TOLERANCE)
    assert ours.grads["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [False, True])
def test_zero_connected_to_the_graph_without_labels(frozen):
    model = tiny_model("llama")
    model.lm_head.requires_grad_(not frozen)
    add_fused_lm_head(model, outputs=ALL)
    ids = torch.randint(3, VOCAB, (2, 6))
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    for name in (*ALL, "label_mask"):
        assert out[name].shape == (2, 5)
        assert not out[name].any(), name
    out.log_probs.sum().backward()
    for name, parameter in model.named_parameters():
        assert (frozen and name == "lm_head.weight") or not parameter.grad.any(), name


def test_fields_on_request():
    model = tiny_model("llama")
    add_fused_lm_head(model, outputs=("entropy",))
    ids = torch.randint(3, VOCAB, (1, 6))
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert set(out.keys()) == {"loss", "log_probs", "entropy", "label_mask"}


def test_forward_without_the_head_is_the_original():
    model = tiny_model("llama")
    ids = torch.randint(3, VOCAB, (2, 6))
    signature = inspect.signature(model.forward)
    want = model(input_ids=ids, labels=ids, num_items_in_batch=7)
    add_fused_lm_head(model)
    out = model(input_ids=ids, labels=ids, num_items_in_batch=7)
    assert_close((out.loss, out.logits), (want.loss, want.logits), rtol=0, atol=0)
    assert inspect.signature(model.forward) == signature
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 8)


def test_a_copy_runs_its_own_weights():
    model, ids = tiny_model("llama"), torch.arange(5)[None]
    add_fused_lm_head(model)
    want, made = model(ids).logits, copy.deepcopy(model)
    disturb_(model, 1.0)
    assert torch.equal(made(ids).logits, want)


def test_entropy_refuses_a_gradient():
    model = tiny_model("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, VOCAB, (1, 6))
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    with pytest.raises(NotImplementedError, match=r"entropy .* has no gradient: use trl\.trainer\.add_fused_lm_head"):
        (out.log_probs.sum() + 0.1 * out.entropy.sum()).backward()


def test_trl_is_left_as_it_was(tmp_path):
    theirs = integration.dpo_trainer.add_fused_lm_head
    make_trainer(FusedDPOTrainer, tmp_path)
    assert integration.dpo_trainer.add_fused_lm_head is theirs
    with pytest.raises(NotImplementedError, match="WPO"):
        make_trainer(FusedDPOTrainer, tmp_path, use_weighting=True, loss_type=["aot"])
    assert integration.dpo_trainer.add_fused_lm_head is theirs


def test_notices_when_trl_stops_adding_the_head(tmp_path, monkeypatch):
    class Changed(FusedDPOTrainer):
        pass

    monkeypatch.setattr(integration, "add_fused_lm_head", lambda model, **options: None)
    with pytest.raises(RuntimeError, match="TRL did not give LlamaForCausalLM the fused head"):
        make_trainer(Changed, tmp_path)


def test_refusals(monkeypatch):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"outputs must be among log_probs, entropy.*; got logits"):
        add_fused_lm_head(model, outputs=("logits",))
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(NotImplementedError, match="does not support DeepSpeed ZeRO-3"):
        add_fused_lm_head(model)
    monkeypatch.undo()
    add_fused_lm_head(model)
    ids = torch.randint(3, VOCAB, (1, 6))
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        model(input_ids=ids, fused_lm_head=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="adapters on lm_head are not supported"):
        adapted(input_ids=ids, labels=ids, fused_lm_head=True)
    quantised = tiny_model("llama")
    add_fused_lm_head(quantised)
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="expected a linear layer of floats"):
        quantised(input_ids=ids, labels=ids, fused_lm_head=True)


def test_refuses_other_series(monkeypatch):
    monkeypatch.setattr(versions, "installed_version", lambda name: "1.17.0")
    spec = importlib.util.find_spec("dpo_kernels.integrations.trl")
    with pytest.raises(ImportError) as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(caught.value) == (
        "dpo_kernels.integrations.trl was tested with trl 1.16 only, got 1.17.0: pip install 'trl>=1.16,<1.17'"
    )
