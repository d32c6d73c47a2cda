"""Liger's own kernels, interpreted, in tiny models: the log-probs and gradients of transformers' layers."""

from __future__ import annotations

import sys

import pytest
import torch

from engine.config.schema import LoraConfig
from engine.errors import UserError
from engine.forecast import Target
from engine.forecast.counting import Shapes
from engine.forecast.live_storage import LiveStorage
from engine.forecast.memory import pack_of
from engine.model import load_policy
from engine.model.kernels import choice, liger
from engine.model.kernels.choice import fuse_blocks, use_kernels
from engine.model.kernels.exchange import Kernels
from engine.model.policy import Layout
from engine.reference import model_digest
from tests.conformance.families import tiny_config, tiny_model
from tests.conformance.trial import EQUAL, try_family
from tests.engine.forecast.large import groups, run_config, save_config
from tests.engine.forecast.test_counting import SMALL
from tests.engine.model.kernels.liger_interpreted import liger_on_the_cpu
from tests.engine.model.kernels.policies import assert_close, gradients, packs, policy_of
from tests.engine.model.test_attention import make_policy

pytest.importorskip("liger_kernel")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Whatever the device, and everything as it was afterwards."""
    liger_on_the_cpu(monkeypatch)
    yield
    for (module, name), function in liger._functions.items():
        setattr(sys.modules[module], name, function)


def names_of(policy) -> set[str]:
    return {getattr(change.fused, "__qualname__", change.name) for change in policy.exchange.changes}


@pytest.mark.parametrize(("how", "lora"), [(True, LoraConfig(r=4)), ("selective", None)])
def test_gradients_are_those_of_plain_layers(how, lora, tiny_model_dir):
    policy = policy_of(tiny_model_dir, how=how, dtype="float32", lora=lora)
    (batch,) = packs(1)
    plain = gradients(policy, batch)
    before = model_digest(policy), set(policy.state_dict()), policy.config.to_dict()
    use_kernels(policy, Kernels("liger"))
    assert {"LigerRMSNorm.forward", "LigerSwiGLUMLP.forward"} <= names_of(policy)
    assert any("_rotary" in name for name in names_of(policy))
    assert_close(gradients(policy, batch), plain)
    assert (model_digest(policy), set(policy.state_dict()), policy.config.to_dict()) == before
    policy.exchange.off()
    assert_close(gradients(policy, batch), plain, 0.0)


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_families_have_layers_of_their_own(family):
    policy = make_policy(tiny_model(tiny_config(family))).train()
    (batch,) = packs(1)
    plain = gradients(policy, batch)
    use_kernels(policy, Kernels("liger"))
    assert "LigerRMSNorm.forward" in names_of(policy)
    assert "LigerExperts.forward" not in names_of(policy)
    assert_close(gradients(policy, batch), plain, 1e-4)


def test_a_second_model_of_the_family_is_plain_until_it_is_asked_to_be_fused(tiny_model_dir):
    """Also one that is loaded while another is fused: none of its classes is Liger's, and its check compares all."""
    first = policy_of(tiny_model_dir, dtype="float32")
    fuse_blocks(first, "liger")
    assert first.kernels == Kernels("liger", "requested")
    second = policy_of(tiny_model_dir, dtype="float32")
    assert not any(type(module).__module__.startswith("liger_kernel") for module in second.modules())
    use_kernels(second, Kernels("liger"))
    assert names_of(second) == names_of(first)


def test_an_activation_that_liger_does_not_have_is_found_out(monkeypatch):
    config = tiny_config("llama")
    config.hidden_act = "gelu"
    policy = make_policy(tiny_model(config))
    with pytest.raises(UserError, match=r"^model\.kernels=liger cannot be used here: it gives other log-probs"):
        fuse_blocks(policy, "liger")
    monkeypatch.setattr(choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(choice, "CHANGES", {"liger": liger.liger_changes})
    fuse_blocks(policy, "auto")
    assert policy.kernels.name == "none"
    assert torch.isfinite(policy.logps(packs(1)[0])).all()


_SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "gemma2", "mixtral", "phi3")]


@pytest.mark.parametrize("family", ["qwen2", *_SLOW])
def test_families_conform(family):
    """Packs against the model's own forward on each sequence, isolation and gradients, as `make conformance` has it."""
    result = try_family(family, "liger")
    assert result.verdict == EQUAL, result


@pytest.mark.parametrize("how", [False, "selective"])
def test_a_forecast_counts_what_its_layers_keep(how, tmp_path):
    """Interpreted on tensors with data, and not launched on tensors without."""
    folder = save_config(tmp_path / "model", **{**SMALL, "num_hidden_layers": 2})
    options = {"dtype": "float32", "attention": "sdpa", "kernels": "liger"}
    config = run_config(folder, train={"gradient_checkpointing": how}, **options)
    target = Target.of_kind("cuda", 1)
    pack = pack_of(config, groups(64, prompt=8, response=4), Layout())
    found = Shapes(config, pack, target, Layout(), False).count(None).activations
    cpu = torch.device("cpu")
    policy = load_policy(config.model, device=cpu, gradient_checkpointing=how, empty=True).train()
    use_kernels(policy, Kernels("liger"))
    count = LiveStorage(cpu, lambda func, args: 0)
    count.watch([*policy.parameters(), *policy.buffers()])
    before = count.current
    with count:
        kept = policy.hidden_states(pack.batch)
    assert kept.requires_grad
    # The forecast is taken where the body ends: what it was called with is alive, too. Plain layers keep a third more.
    assert found == pytest.approx(count.current - before, rel=0.05)
