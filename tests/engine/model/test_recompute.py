"""Gradient checkpointing in full and selectively: the same gradients, and what runs a second time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.schema import LoraConfig, ModelConfig
from engine.model import load_policy
from engine.model.recompute import is_kept
from tests.engine.model.test_adapters import pack

LAYERS = 2
CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """How often each operator ran, thin products apart."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func, is_kept(func) and not is_kept(func, *args)] += 1
        return func(*args, **(kwargs or {}))


def backward(folder, how, **options):
    """(log-probs and gradients, operators of forward, of forward and backward)."""
    torch.manual_seed(0)
    model = ModelConfig(model_name_or_path=str(folder), **options)
    policy = load_policy(model, device=CPU, gradient_checkpointing=how).train()
    with Calls() as calls:
        logps = policy.logps(pack())
        forward = Counter(calls.counts)
        logps.sum().backward()
    return [logps.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)], forward, calls.counts


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize(("dtype", "lora"), [("float32", None), ("bfloat16", LoraConfig(r=4))])
def test_products_and_attention_run_once(dtype, lora, attention, tiny_model_dir):
    runs = {
        how: backward(tiny_model_dir, how, dtype=dtype, lora=lora, attention=attention)
        for how in (False, True, "selective")
    }
    (plain, forward, _), (_, _, full), (_, _, selective) = runs.values()
    assert len(plain) > 1
    for results, _, _ in runs.values():
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))
    kept = {(func, thin) for func, thin in forward if is_kept(func) and not thin}
    assert any("mm" in func.name() for func, _ in kept)
    assert any("atten" in func.name() for func, _ in kept)
    # Of products of three dimensions there is only that of the rotation, before the blocks.
    for func in (func for func in kept if "bmm" not in func[0].name()):
        # The last product of a block is never computed again: nothing in the block needs what it gave. That of an
        # adapter is thin.
        last = LAYERS if "mm" in func[0].name() and lora is None else 0
        assert full[func] - selective[func] == forward[func] - last, func
    cheap = [func for func in forward if "silu" in func[0].name()]
    assert cheap
    thin = [func for func in forward if func[1]]
    assert bool(thin) == (lora is not None)
    assert all(full[func] == selective[func] for func in (*cheap, *thin))


@pytest.mark.parametrize(
    "name",
    ["aten::_scaled_dot_product_flash_attention", "aten::_efficient_attention_forward", "torch_attn::_varlen_attn",
     "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::fwd", "aten::_grouped_mm",
     "transformers::grouped_mm_fallback", "aten::addmm"],
)  # fmt: skip
def test_operators_of_other_libraries_are_kept(name):
    """By the names that they are registered with."""

    class Operator:
        class _schema:  # noqa: N801
            pass

    Operator._schema.name = name
    assert is_kept(Operator)
