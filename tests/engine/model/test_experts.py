"""Under autocast the experts of a mixture multiply in the compute dtype; their weights and gradients stay float32."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from engine.model.experts import EXPERTS, grouped_experts, register_experts
from tests.conformance.families import model_types, tiny_config, tiny_model

BF16 = torch.bfloat16
FAST = ("mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")


class Products(TorchDispatchMode):
    """Dtypes of the matrix products that run inside experts, and of all grouped ones."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inside = 0
        self.seen: list[tuple[str, torch.dtype]] = []
        for module in model.modules():
            # Stacked weights are what grouped products take; lists of linear layers have their own autocast rule.
            if re.search(r"Experts$", type(module).__name__):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *unused):
        self.inside += 1

    def _leave(self, *unused):
        self.inside -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS and (self.inside or name == "_grouped_mm"):
            self.seen += [(name, t.dtype) for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.ndim > 1]
        return func(*args, **(kwargs or {}))


def mixture(family: str) -> nn.Module | None:
    """A tiny model of a family, with the engine's experts; None for one without experts."""
    try:
        config = tiny_config(family)
    except Exception:
        return None
    if not any(re.search("expert|moe", name) for name in vars(config)):
        return None
    register_experts()
    config._experts_implementation = EXPERTS
    return tiny_model(config)


def families() -> list:
    return [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in model_types()]


@pytest.mark.parametrize("family", families())
def test_products_of_experts_are_in_the_dtype_of_autocast(family):
    try:
        model = mixture(family)
    except Exception as error:
        pytest.skip(f"{family} cannot be built small: {error}")
    if model is None:
        pytest.skip(f"{family} has no experts")
    ids = torch.arange(24).view(1, 24)
    with Products(model) as products:
        try:
            with torch.autocast("cpu", dtype=BF16):
                loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
            loss.backward()
        except Exception as error:
            if family in FAST:
                raise
            pytest.skip(f"{family} does not run under autocast: {error}")
    if family in FAST:
        assert products.seen
    assert {dtype for _, dtype in products.seen} <= {BF16}
    grads = [p.grad for n, p in model.named_parameters() if "expert" in n and p.grad is not None]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def gradients(experts: nn.Module, forward, inputs: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients, in float64."""
    hidden, weights = (t.detach().clone().requires_grad_() for t in inputs)
    experts.zero_grad()
    out = forward(experts, hidden, index, weights)
    torch.manual_seed(3)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return [out.detach().double(), hidden.grad.double(), weights.grad.double()] + [
        p.grad.double() for p in experts.parameters()
    ]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_the_same_bits_as_a_model_of_that_dtype(family):
    """Float32 experts under autocast are what transformers computes with experts of 16 bits, gradients included."""
    model = mixture(family)
    experts = next(m for m in model.modules() if re.search(r"Experts$", type(m).__name__))
    torch.manual_seed(0)
    hidden = torch.randn(40, model.config.hidden_size)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(40)])
    weights = torch.rand(40, 2)
    own = type(experts).forward.__wrapped__
    exact = gradients(experts.double(), own, [hidden.double(), weights.double()], index)
    half = copy.deepcopy(experts).to(BF16)
    theirs = gradients(half, grouped_mm_experts_forward, [hidden.to(BF16), weights], index)
    with torch.autocast("cpu", dtype=BF16):
        ours = gradients(experts.float(), grouped_experts, [hidden, weights], index)
    for want, same, got in zip(exact, theirs, ours, strict=True):
        assert torch.equal(got, same)
        assert (got - want).norm() <= 0.02 * want.norm()


def test_experts_of_8_bits_keep_their_own_products():
    register_experts()
    found = ALL_FP8_EXPERTS_FUNCTIONS.get_interface(EXPERTS, None)
    assert found is ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"] is not grouped_experts
    assert ALL_EXPERTS_FUNCTIONS.get_interface(EXPERTS, None) is grouped_experts


def test_without_autocast_nothing_is_cast():
    model = mixture("mixtral")
    with Products(model) as products:
        model(input_ids=torch.arange(6).view(1, 6), use_cache=False)
    assert {dtype for _, dtype in products.seen} == {torch.float32}
