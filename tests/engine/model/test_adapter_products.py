"""Adapters in two products: as exact as peft's own forward, with fewer passes, and only where they are no more."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.schema import LoraConfig, ModelConfig
from engine.model import Policy, load_policy
from engine.model.adapter_products import join_products
from engine.train.checkpoint import save_weights
from tests.engine.model.adapter_setup import disturb_, pack

pytest.importorskip("peft")
CPU = torch.device("cpu")
ADAPTED = 7 * 2
"""Linear layers of the tiny model's blocks."""
KINDS = {
    "lora": LoraConfig(r=4),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "copies": LoraConfig(r=4, target_modules=("v_proj",), modules_to_save=("lm_head", "embed_tokens")),
}
MORE = {"dropout": LoraConfig(r=4, dropout=0.5), "dora": LoraConfig(r=4, use_dora=True)}


class Operators(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def base(tiny_model_dir) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(tiny_model_dir))


def policy_of(base: ModelConfig, lora: LoraConfig, dtype: str = "bfloat16", *, own: bool = False, **options) -> Policy:
    """``own``: peft's forward."""
    torch.manual_seed(0)
    policy = load_policy(replace(base, dtype=dtype, lora=lora), device=CPU, **options)
    disturb_(policy.train())
    if own:
        give_back(policy)
    return policy


def give_back(policy: Policy) -> int:
    return sum(vars(module).pop("forward", None) is not None for module in policy.modules())


def backward(policy: Policy) -> tuple[list[torch.Tensor], Counter[str]]:
    torch.manual_seed(1)
    with Operators() as operators:
        logps = policy.logps(pack())
        logps.sum().backward()
    return [logps.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)], operators.names


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(96, 160, bias=False)


@pytest.mark.parametrize("shape", [(96,), (7, 96), (1, 300, 96), (2, 0, 96), (2, 5, 3, 96)])
@pytest.mark.parametrize("seed", range(3))
def test_a_layer_is_as_exact_as_pefts(shape, seed):
    """Output and gradients beside float64."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=24, target_modules=["layer"])
    model = peft.get_peft_model(Layer().bfloat16(), config).base_model.model
    for weight in (model.layer.lora_A.default.weight, model.layer.lora_B.default.weight):
        weight.data = 0.3 * torch.randn(weight.shape)
    x, upstream = torch.randn(shape).bfloat16(), torch.randn(*shape[:-1], 160).bfloat16()

    def run(layer: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        given = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = layer(given)
        trained = [p for p in layer.parameters() if p.requires_grad]
        return [output.detach(), *torch.autograd.grad(output, [given, *trained], upstream.to(dtype))]

    exact = run(copy.deepcopy(model).double().layer, torch.float64)
    plain = run(model.layer, torch.bfloat16)
    join_products(model)
    found = run(model.layer, torch.bfloat16)
    for ours, theirs, want in zip(found, plain, exact, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert (ours - want).norm() <= 2 * (theirs - want).norm() + 1e-6 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_a_model_is_as_near_to_float32_as_with_pefts_forward(kind, checkpointing, base):
    options = {"gradient_checkpointing": checkpointing}
    (found, _), (plain, _) = (backward(policy_of(base, KINDS[kind], own=own, **options)) for own in (False, True))
    exact = policy_of(base, KINDS[kind], "float32")
    exact.load_state_dict({name: p.float() for name, p in policy_of(base, KINDS[kind]).state_dict().items()})
    want, _ = backward(exact)
    assert len(found) == len(plain) == len(want) > 1
    errors, allowed = (
        torch.stack([(a.double() - b).norm() / b.double().norm() for a, b in zip(results, want, strict=True)])
        for results in (found, plain)
    )
    assert errors.square().mean().sqrt() <= 1.5 * allowed.square().mean().sqrt()


def test_passes_that_are_saved(base):
    (_, joined), (_, own) = (backward(policy_of(base, KINDS["lora"], own=own)) for own in (False, True))
    # the input widened and narrowed, and on the way back its gradient, but for the first layers'
    assert own["_to_copy"] - joined["_to_copy"] >= 3 * ADAPTED
    assert own["add"] - joined["add"] >= ADAPTED
    assert joined["addmm"] - own["addmm"] == ADAPTED


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_on_quantised_layers(quantization, base):
    pytest.importorskip("bitsandbytes")
    quantised = replace(base, quantization=quantization)
    runs = [backward(policy_of(quantised, KINDS["lora"], own=own)) for own in (False, True)]
    (found, joined), (plain, own) = runs
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours - theirs).norm() <= 0.1 * theirs.norm()
    assert joined["addmm"] - own["addmm"] == ADAPTED
    assert own["add"] - joined["add"] >= ADAPTED


@pytest.mark.parametrize("kind", MORE)
def test_adapters_that_are_more_run_as_peft_has_them(kind, base):
    (found, joined), (plain, own) = (backward(policy_of(base, MORE[kind], own=own)) for own in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert joined == own


def test_without_autocast_the_bits_are_pefts(base):
    (found, joined), (plain, own) = (
        backward(policy_of(base, KINDS["lora"], "float32", own=own)) for own in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert joined == own


@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_the_base_and_fresh_adapters_change_no_bit(base):
    torch.manual_seed(0)
    fresh = load_policy(replace(base, lora=KINDS["lora"]), device=CPU)
    without = load_policy(base, device=CPU, weights_dtype="bfloat16")
    with torch.no_grad():
        want = without.logps(pack())
        assert torch.equal(fresh.logps(pack()), want)
        disturb_(fresh)
        assert not torch.equal(fresh.logps(pack()), want)
        with fresh.reference_mode():
            assert torch.equal(fresh.logps(pack()), want)


def test_a_copy_of_a_model_computes_with_its_own_weights(base):
    policy = policy_of(base, KINDS["lora"]).eval()
    other = copy.deepcopy(policy)
    with torch.no_grad():
        before = policy.logps(pack())
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert torch.equal(policy.logps(pack()), before)
        assert not torch.equal(other.logps(pack()), before)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_that_goes_on_is_its_own_reference(dropout, base, tmp_path):
    """In evaluation to the bit: its frozen copy has no dropout."""
    save_weights(policy_of(base, LoraConfig(r=4, dropout=dropout)), tmp_path / "adapter")
    policy = load_policy(replace(base, adapter_name_or_path=str(tmp_path / "adapter")), device=CPU)
    with torch.no_grad(), policy.eval().reference_mode():
        reference = policy.logps(pack())
    with torch.no_grad(), Operators() as operators:
        assert torch.equal(policy.logps(pack()), reference)
    assert operators.names["addmm"] == ADAPTED
    _, names = backward(policy.train())
    assert names["addmm"] == (0 if dropout else ADAPTED)
    join_products(policy)
    assert give_back(policy) == ADAPTED


def test_joined_layers_are_pickled(base):
    policy = policy_of(base, KINDS["lora"])
    layer = next(m for m in policy.modules() if "forward" in vars(m))
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, layer.in_features).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Operators() as operators:
        assert torch.equal(again(x), layer(x))
    assert operators.names["addmm"] == 2


class Wide(torch.nn.Linear):
    """Gives float32 whatever autocast says."""

    def forward(self, x):
        return super().forward(x).float()


def test_a_layer_of_another_dtype_runs_once():
    peft = pytest.importorskip("peft")
    model = Layer()
    model.layer = Wide(96, 160, bias=False)
    config = peft.LoraConfig(r=8, target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(model.bfloat16(), config).base_model.model
    x = torch.randn(5, 96).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        want = model.layer(x)
        join_products(model)
        with Operators() as operators:
            found = model.layer(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)
    assert operators.names["mm"] == 3
