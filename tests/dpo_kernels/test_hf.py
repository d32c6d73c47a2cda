"""Rows from padded batches, and the head inside a transformers model, against plain torch on the model's logits."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from dpo_kernels.hf import LinearDPOLoss, attach_head, completion_rows, pair_loss, response_logps
from tests.engine.model.families import VOCAB, tiny_model

peft = pytest.importorskip("peft")

# Prompt and response lengths of chosen_0, chosen_1, rejected_0, rejected_1.
SIZES = ((3, 4), (2, 1), (3, 2), (2, 5))
IN_TURN = (0, 2, 1, 3)
REF = torch.tensor([-21.0, -14.0, -27.0, -20.0], dtype=torch.float64)


def make_batch(padding: str = "right", order: str = "halves") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, VOCAB, (sum(size),), generator=generator) for size in SIZES]
    L = max(map(len, rows)) + 1
    batch = {"input_ids": torch.zeros(4, L, dtype=torch.long), "attention_mask": torch.zeros(4, L, dtype=torch.long)}
    batch["labels"] = torch.full((4, L), -100)
    for b, (row, (prompt, response)) in enumerate(zip(rows, SIZES, strict=True)):
        first = 0 if padding == "right" else L - len(row)
        batch["input_ids"][b, first : first + len(row)] = row
        batch["attention_mask"][b, first : first + len(row)] = 1
        batch["labels"][b, first + prompt : first + prompt + response] = row[prompt:]
    return batch if order == "halves" else {name: tensor[list(IN_TURN)] for name, tensor in batch.items()}


def naive_logps(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """[B], as everyone writes it."""
    counts = labels_BL[:, 1:] != -100
    logps = logits_BLV[:, :-1].log_softmax(-1).gather(2, labels_BL[:, 1:].clamp(min=0)[..., None]).squeeze(2)
    return (logps * counts).sum(1)


def naive_step(model, batch, *, beta=0.1, **given):
    """(loss, log-probs of chosen_0, rejected_0, ...) of a batch in halves, from the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **given).logits
    logps = naive_logps(logits, batch["labels"])
    chosen, rejected = logps.chunk(2)
    loss = -F.logsigmoid(beta * ((chosen - REF[0::2]) - (rejected - REF[1::2]))).mean()
    return loss, torch.stack([chosen, rejected], 1).reshape(-1)


def assert_same_gradients(model, loss, want_loss, rtol=1e-9, atol=1e-11):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    want = torch.autograd.grad(want_loss, list(parameters.values()), allow_unused=True)
    assert any(grad is not None and grad.any() for grad in want)
    for name, grad, truth in zip(parameters, found, want, strict=True):
        assert (grad is None) == (truth is None), name
        if truth is not None:
            assert_close(grad, truth, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def attach_and_compare(model, batch):
    """Attach the head; loss, log-probs and gradients are those of plain torch, whose loss is returned."""
    want_loss, want_logps = naive_step(model, batch)
    attach_head(model)
    out = model(**batch, objective=pair_loss(REF))
    assert_close(out.loss, want_loss, rtol=1e-10, atol=1e-12)
    assert_close(out.logps, want_logps.detach(), rtol=1e-10, atol=1e-10)
    assert_same_gradients(model, out.loss, want_loss)
    return want_loss


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("order", ["halves", "interleaved"])
def test_rows_of_a_batch(padding, order):
    batch = make_batch(padding, order)
    B, L = batch["input_ids"].shape
    # Each state says where it is.
    hidden = torch.stack(torch.meshgrid(torch.arange(B), torch.arange(L), indexing="ij"), dim=2).float()
    rows = completion_rows(hidden, **batch, order=order)
    assert rows.cu_responses.tolist() == [0, 4, 6, 7, 12]
    expected = []
    for b in IN_TURN if order == "halves" else range(4):
        at = (batch["labels"][b] != -100).nonzero().squeeze(1).tolist()
        expected += [([b, t - 1], batch["input_ids"][b, t].item()) for t in at]
    assert list(zip(rows.hidden_TD.tolist(), rows.labels_T.tolist(), strict=True)) == expected
    masked = {"input_ids": batch["input_ids"], "completion_mask": (batch["labels"] != -100).long()}
    for name, found in completion_rows(hidden, **masked, order=order)._asdict().items():
        assert torch.equal(found, getattr(rows, name)), name


def test_padding_and_first_tokens_are_not_learned():
    """Labels that are a copy of the ids, as in a notebook: what has no state before it, or is padding, drops out."""
    for padding in ("right", "left"):
        batch = make_batch(padding)
        hidden = torch.zeros(*batch["input_ids"].shape, 2)
        rows = completion_rows(hidden, labels=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert len(rows.labels_T) == sum(map(sum, SIZES)) - len(SIZES)


def test_what_does_not_fit_is_said():
    batch = make_batch()
    hidden = torch.zeros(4, 8, 2)
    assert batch["input_ids"].shape == (4, 8)

    def refused(match, hidden=hidden, **changes):
        with pytest.raises(ValueError, match=match):
            completion_rows(hidden, **{**batch, **changes})

    refused(r"hidden states must have shape \[sequences, tokens, features\]; got \[8, 2\]", hidden=hidden[0])
    refused(r"labels must have shape \[4, 8\], like the tokens; got \[4, 7\]", labels=batch["labels"][:, 1:])
    refused("a batch of pairs must hold chosen sequences, then as many rejected ones; got 3", hidden=hidden[:3])
    refused(r"attention_mask must have .* got \[4, 1, 8, 8\]: pass the 2-d", attention_mask=torch.ones(4, 1, 8, 8))
    refused("order must be one of halves, interleaved; got 'pairs'", order="pairs")
    refused("pass labels, with -100 where a token does not count, or input_ids and completion_mask", labels=None)
    refused("pass labels or completion_mask, not both", completion_mask=batch["attention_mask"])
    refused("attention_mask must hold 0 and 1; numbers above 1", attention_mask=batch["attention_mask"] * 2)
    refused("attention_mask must hold 0 and 1", attention_mask=(1 - batch["attention_mask"]) * -1e9)
    refused("completion_mask must hold 0 and 1", labels=None, completion_mask=batch["attention_mask"] * 2)
    empty = batch["labels"].clone()
    empty[2] = -100
    refused("sequence 2 of the batch has no token that counts: all of its labels are -100", labels=empty)
    refused("they seem to be shifted already", labels=batch["labels"].roll(-1, 1))
    refused("labels must be the input_ids, not shifted, or -100; got label 5", labels=batch["labels"] * 0 + 5)


@pytest.mark.parametrize(
    ("family", "padding"),
    [(name, "right") for name in ("llama", "gpt2", "gemma2", "cohere", "granite", "phi")]
    + [(name, "left") for name in ("llama", "gpt2")],
)
def test_a_step_is_that_of_plain_torch(family, padding):
    model = tiny_model(family).double()
    # Eager attention gives nan in rows of padding alone.
    model.set_attn_implementation("sdpa" if padding == "left" else "eager")
    batch = make_batch(padding)
    want_loss = attach_and_compare(model, batch)
    turned = make_batch(padding, "interleaved")
    attach_head(model, order="interleaved")
    assert_close(model(**turned, objective=pair_loss(REF)).loss, want_loss, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_a_batch_whose_parts_differ_in_length_is_refused_before_the_model(name):
    model, batch = tiny_model("llama"), make_batch()
    attach_head(model)
    B, L = batch["input_ids"].shape
    batch[name] = batch[name][:, 1:]
    with pytest.raises(
        ValueError, match=rf"{name} must have shape \[{B}, {L}\], like the tokens; got \[{B}, {L - 1}\]"
    ):
        model(**batch, objective=pair_loss(REF))


class RowFactors(torch.nn.Linear):
    """An output layer with a factor and a shift of each row."""

    def __init__(self, width: int, rows: int):
        super().__init__(width, rows)
        self.factor = torch.nn.Parameter(torch.linspace(0.5, 2.0, rows))

    def forward(self, hidden):
        return super().forward(hidden) * self.factor.to(hidden.dtype)


def test_an_output_layer_with_a_forward_of_its_own_is_the_linear_map_that_it_is():
    model, batch = tiny_model("llama"), make_batch()
    torch.manual_seed(0)
    model.set_output_embeddings(RowFactors(model.config.hidden_size, VOCAB))
    model = model.double()
    attach_and_compare(model, batch)


def lora_model(**options):
    config = peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(tiny_model("llama"), config).double().eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_bias": True},
        {"use_rslora": True, "r": 16},
        {"use_dora": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_adapters_on_the_head_are_part_of_it(options):
    model, batch = lora_model(**options), make_batch()
    want_loss, _ = naive_step(model, batch)
    with model.disable_adapter():
        _, want_base = naive_step(model, batch)
    attach_head(model)
    out = model(**batch, objective=pair_loss(REF))
    assert_close(out.loss, want_loss, rtol=1e-10, atol=1e-12)
    assert_same_gradients(model, out.loss, want_loss)
    with model.disable_adapter(), torch.no_grad():
        assert_close(model(**batch, objective=response_logps), want_base.detach(), rtol=1e-10, atol=1e-10)


def test_a_merged_adapter_counts_once_and_dropout_acts():
    model, batch = lora_model(lora_dropout=0.5), make_batch()
    want = naive_step(model, batch)[1].detach()
    attach_head(model)
    assert_close(model(**batch, objective=response_logps).detach(), want, rtol=1e-10, atol=1e-10)
    model.train()
    torch.manual_seed(1)
    first, second = (model(**batch, objective=response_logps).detach() for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    model.merge_adapter()
    assert_close(model(**batch, objective=response_logps).detach(), want, rtol=1e-9, atol=1e-9)
    with model.disable_adapter():
        base = model(**batch, objective=response_logps).detach()
    assert (base - want).abs().min() > 1e-3


def test_the_router_is_trained_as_by_the_model():
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5).double()
    model.set_experts_implementation("eager")
    batch = make_batch()
    want_loss, _ = naive_step(model, batch)
    labels = batch["labels"]
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    aux = model(**given, labels=labels).aux_loss
    attach_head(model)
    out = model(**given, labels=labels, objective=pair_loss(REF))
    assert_close(out.loss, want_loss + 0.5 * aux, rtol=1e-6, atol=1e-6)
    # Mixtral's router computes in float32.
    assert_same_gradients(model, out.loss, want_loss + 0.5 * aux, rtol=1e-4, atol=1e-6)


def test_a_router_whose_config_lacks_a_number_is_refused(monkeypatch):
    batch = make_batch()
    for name, match in (
        ("router_aux_loss_coef", "the config of mixtral has no router_aux_loss_coef: set it"),
        ("num_experts_per_tok", "the config of mixtral has none of num_experts_per_tok, .*: set it"),
    ):
        model = tiny_model("mixtral", output_router_logits=True)
        attach_head(model, check=False)
        monkeypatch.delattr(type(model.config), name, raising=False)
        del model.config.__dict__[name]
        with pytest.raises(ValueError, match=match):
            model(**batch, objective=pair_loss(REF))
        monkeypatch.undo()


def test_a_router_sees_a_mask_that_is_passed_by_place():
    model, batch = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=9.0), make_batch()
    attach_head(model)
    want = model(**batch, objective=pair_loss(REF)).loss
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    assert torch.equal(model(ids, mask, **batch, objective=pair_loss(REF)).loss, want)


def test_options_of_the_loss_and_an_objective_of_ones_own():
    model, batch = tiny_model("llama"), make_batch()
    attach_head(model)
    out = model(**batch, objective=pair_loss(None, loss_type="simpo", beta=2.0, pair_weights=torch.tensor([1.0, 0.0])))
    assert out.chosen_rewards.shape == (2,)
    assert out.loss.item() == pytest.approx(out.pair_losses[0].item() / 2)
    shape = model(**batch, objective=lambda rows, head: (rows.hidden_TD.shape, head.weight_VD.shape))
    assert shape == ((12, 32), (VOCAB, 32))


def test_references_are_no_argument_that_fsdp_would_round():
    """FSDP2 casts every floating tensor that it finds among the arguments of a model to the dtype of its parameters."""
    (leaf,), _ = pytree.tree_flatten({"objective": pair_loss(REF)})
    assert callable(leaf)


def test_without_an_objective_nothing_changes():
    model, batch = tiny_model("llama"), make_batch()
    want = model(**batch)
    attach_head(model)
    out = model(**batch)
    assert_close((out.loss, out.logits), (want.loss, want.logits), rtol=0, atol=0)
    assert model.generate(batch["input_ids"][:, :3], max_new_tokens=2, do_sample=False).shape == (4, 5)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "forward of the instance"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_run_their_own_weights_and_have_the_head(how, hooked):
    """A forward of the instance is what accelerate's hooks leave behind."""
    model, batch = tiny_model("llama"), make_batch()
    if hooked:
        model.forward = model.forward
    attach_head(model)
    want, logits = model(**batch, objective=pair_loss(REF)), model(**batch).logits
    made = COPIES[how](model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(made(**batch).logits, logits)
    found = made(**batch, objective=pair_loss(REF))
    assert isinstance(found, LinearDPOLoss)
    assert torch.equal(found.loss, want.loss)
    assert type(made).__name__ == "LlamaForCausalLM"
    assert made.generate(batch["input_ids"][:, :3], max_new_tokens=2, do_sample=False).shape == (4, 5)


def test_a_saved_model_has_the_name_of_its_class_and_no_more(tmp_path):
    model = tiny_model("llama")
    attach_head(model)
    model.save_pretrained(tmp_path)
    loaded = type(tiny_model("llama")).from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_arguments_by_place_and_tuples():
    model, batch = tiny_model("llama"), make_batch()
    attach_head(model)
    want = model(**batch, objective=pair_loss(REF)).loss
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert torch.equal(model(ids, mask, None, None, None, labels, objective=pair_loss(REF)).loss, want)
    assert torch.equal(model(**batch, return_dict=False, objective=pair_loss(REF)).loss, want)
    model.config.return_dict = False
    assert torch.equal(model(**batch, objective=pair_loss(REF)).loss, want)


@pytest.mark.parametrize("name", ["bias", "softcap", "logit_scale", "temperature"])
def test_what_the_model_decides_is_no_option_of_the_loss(name):
    with pytest.raises(ValueError, match=f"pair_loss reads {name} from the model"):
        pair_loss(REF, **{name: 2.0})


def test_models_that_it_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="attach_head takes a causal language model of transformers; got Linear"):
        attach_head(torch.nn.Linear(2, 2))
    model = tiny_model("llama")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="the output layer of LlamaForCausalLM is Sequential; expected a linear layer"):
        attach_head(model)
    model = lora_model(use_dora=True, lora_dropout=0.5).train()
    attach_head(model)
    with pytest.raises(ValueError, match="the output layer is DoRA with dropout, which is no product with one weight"):
        model(**make_batch(), objective=pair_loss(REF))
    with pytest.raises(ValueError, match="the output layer is ALoraLinear, expected LoRA or DoRA; or leave lm_head"):
        attach_head(lora_model(alora_invocation_tokens=[1]))
    with pytest.raises(ValueError, match="order must be one of halves"):
        attach_head(tiny_model("llama"), order="chosen first")


def test_a_model_with_more_to_its_logits_is_refused():
    model = tiny_model("llama")
    modes = [module.training for module in model.train().modules()]
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 0.5 * out.logits
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match=r"gives log-probs that differ by .* than its config says"):
        attach_head(model)
    assert [module.training for module in model.modules()] == modes
    assert model.forward is scaled
