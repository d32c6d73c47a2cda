"""Rows of mixers end to end: taken where kernels keep sequences apart, and padded wherever they do not."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from engine.config.schema import LoraConfig, ModelConfig
from engine.model import Policy, check_packing, load_policy
from engine.model.end_to_end import take_boundaries
from engine.model.layouts import describe_layout, use_layout
from engine.model.mixers import boundary_arguments
from engine.packing import build_batch
from engine.packing.rows import Segment, plan_rows
from tests.conformance.families import tiny_config, tiny_model
from tests.conformance.trial import GRAD_BOUND, LOGPS_BOUND, one_by_one, sample_groups
from tests.engine.model.kernel_stand_ins import FAULTS, install_all
from tests.engine.model.test_mixers import backward

CPU = torch.device("cpu")
REASONS = {
    "backward": " gives another gradient of input 0",
    "chunks": " leaks tokens between responses of a pack",
    "refusal": " raises RuntimeError with its gradients: Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs ",
}
FAMILIES = {"qwen3_5_text": "Qwen3_5GatedDeltaNet", "mamba2": "Mamba2Mixer"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request, tmp_path_factory):
    """A model, its folder, and what it gives one response at a time."""
    config = tiny_config(request.param)
    if request.param == "mamba2":
        config.chunk_size, config.num_hidden_layers = 32, 2
    model = tiny_model(config)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, str(folder), one_by_one(model, sample_groups()), sys.modules[type(model).__module__]


def load(folder: str, **options) -> Policy:
    model = ModelConfig(
        model_name_or_path=folder, dtype=options.pop("dtype", "float32"), lora=options.pop("lora", None)
    )
    policy = load_policy(model, device=CPU, **options)
    check_packing(policy)
    return policy


def holds(policy: Policy, expected) -> None:
    logps, grads = backward(policy, [build_batch([group]) for group in sample_groups()])
    assert (logps - expected.logps_N).abs().max() <= LOGPS_BOUND
    for name, want in expected.grads.items():
        error = (grads[f"model.{name}"] - want).abs().max()
        assert error <= GRAD_BOUND * max(1.0, want.abs().max().item()), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kernels_that_keep_rows_apart_get_them_end_to_end(saved, checkpointing, monkeypatch):
    family, folder, expected, module = saved
    install_all(monkeypatch, module)
    policy = load(folder, gradient_checkpointing=checkpointing)
    assert policy.layout.joined, policy.layout
    assert describe_layout(policy).startswith(f"packs, mixers in rows: {FAMILIES[family]} x ")
    assert ", end to end (" in describe_layout(policy)
    rows = policy.rows_of(build_batch(sample_groups()))
    assert rows.num_cells == rows.num_row_tokens
    holds(policy, expected)


@pytest.mark.parametrize("offload", [False, True])
def test_adapters_inside(saved, offload, monkeypatch):
    """Against the same adapters with padded rows."""
    family, folder, _, module = saved
    install_all(monkeypatch, module)
    policy = load(
        folder,
        lora=LoraConfig(r=2, target_modules=("in_proj_qkv", "out_proj") if family == "qwen3_5_text" else ("in_proj",)),
    )
    policy.activation_offload = offload
    assert policy.layout.joined
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    logps, grads = backward(policy, [build_batch(sample_groups())])
    use_layout(policy, policy.layout._replace(joined=False))
    want_logps, want = backward(policy, [build_batch(sample_groups())])
    assert (logps - want_logps).abs().max() <= LOGPS_BOUND
    assert any("in_proj" in name and grad.abs().max() > 0 for name, grad in want.items())
    for name, grad in want.items():
        assert (grads[name] - grad).abs().max() <= GRAD_BOUND * max(1.0, grad.abs().max().item()), name


def test_bfloat16_is_as_near_as_padded_rows(saved, monkeypatch):
    _, folder, expected, module = saved
    install_all(monkeypatch, module)
    policy = load(folder, dtype="bfloat16")
    assert policy.layout.joined
    batch = build_batch(sample_groups())
    errors = []
    for joined in (True, False):
        use_layout(policy, policy.layout._replace(joined=joined))
        with torch.no_grad():
            errors.append((policy.logps(batch) - expected.logps_N).abs().max())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("fault", list(FAULTS))
def test_kernels_at_fault_get_padded_rows(saved, fault, monkeypatch):
    _, folder, expected, module = saved
    install_all(monkeypatch, module, fault)
    policy = load(folder)
    assert policy.layout.kind == "mixers"
    assert not policy.layout.joined
    assert REASONS.get(fault, "") in policy.layout.padded_for != ""
    assert f"rows are padded, since end to end {policy.layout.padded_for}" in describe_layout(policy)
    holds(policy, expected)


def test_without_kernels_rows_are_padded_and_what_to_install_is_said(saved):
    _, folder, expected, _ = saved
    policy = load(folder)
    assert not policy.layout.joined
    assert policy.layout.padded_for
    if Version(transformers.__version__) >= Version("5.23"):
        # Earlier ones leave the boundaries aside without a word, which the check finds.
        assert "cannot run with rows end to end: ValueError in " in policy.layout.padded_for
        assert policy.layout.padded_for.endswith("Install `causal_conv1d` to train on packed sequences.")
    holds(policy, expected)


class Named(nn.Module):
    def forward(self, x, cu_seq_lens_q=None):
        return x


class Open(nn.Module):
    def forward(self, x, **kwargs):
        return x


class Closed(nn.Module):
    def forward(self, x, attention_mask=None):
        return x


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ([Named], {"cu_seq_lens_q"}),
        ([Open], {"cu_seq_lens_q", "cu_seqlens_cpu", "seq_idx"}),
        ([Closed], set()),
        ([Open, Closed], None),
        ([], None),
    ],
)
def test_modules_are_told_what_they_take(kinds, told):
    model = nn.Sequential(*(kind() for kind in kinds))
    rows = plan_rows([Segment(0, 3, 0, 0), Segment(3, 5, 0, 2)], "joined")
    assert take_boundaries(model, tuple(kind.__name__ for kind in kinds)) == bool(told)
    if told is not None:
        assert boundary_arguments(kinds[0], rows).keys() == told
        assert not boundary_arguments(kinds[0], plan_rows([Segment(0, 3, 0, 0)]))
