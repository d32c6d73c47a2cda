"""What the checks before the first step say beyond what families on trial show (tests/conformance)."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.errors import BackendError, UserError
from engine.model import check_dataset, check_packing, checks
from engine.model.attention import Backend, interface
from engine.model.checks import Fault
from tests.conformance.families import LONG, tiny_config
from tests.conformance.families import tiny_model as model_of
from tests.engine.model.families import tiny_model
from tests.engine.model.test_attention import make_policy


def dataset(*lengths: int) -> PreferenceDataset:
    """Groups with one prompt token; the longest response has the given number of tokens less one."""

    def ids(count: int) -> np.ndarray:
        return np.full(count, 5, dtype=np.int32)

    return PreferenceDataset([PreferenceGroup(row, ids(1), (ids(n - 1), ids(1))) for row, n in enumerate(lengths)])


def test_a_window_longer_than_the_probe_is_still_checked(monkeypatch):
    policy = make_policy(model_of(tiny_config("mistral", reach=LONG)))
    check_packing(policy)
    assert policy.config.sliding_window == LONG
    attention = policy.causal_lm.model.layers[0].self_attn
    forward = type(attention).forward

    def without_window(self, *args, **kwargs):
        window, self.config.sliding_window = self.config.sliding_window, None
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config.sliding_window = window

    monkeypatch.setattr(type(attention), "forward", without_window)
    with pytest.raises(UserError, match=r"different log-probs on packs.*layers\.0\.self_attn \(MistralAttention\)"):
        check_packing(policy, requested="shared")
    assert policy.config.sliding_window == LONG


def test_sharing_alone_at_fault_is_said(monkeypatch):
    policy = make_policy(tiny_model("llama"))
    monkeypatch.setattr(
        checks, "_difference", lambda policy, share_prompts, seed: Fault("it differs") if share_prompts else None
    )
    with pytest.raises(UserError, match=r"^it differs; .* set packing\.share_prompts to false$"):
        check_packing(policy, requested="shared")
    check_packing(policy, share_prompts=False)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_model_that_reads_what_is_behind_is_refused_however_packs_are_made(share_prompts):
    """Without shared prompts nothing of another response shows it: the response itself has to."""
    config = tiny_config("xlm")
    config.causal = False
    policy = make_policy(model_of(config))
    with pytest.raises(UserError, match="is not causal one row at a time: what it says of a token depends on"):
        check_packing(policy, share_prompts=share_prompts)


def test_a_family_that_half_precision_alone_breaks_is_told_so():
    """It adds values of one dtype to another under autocast; in float32 it is equal."""
    model = model_of(tiny_config("dbrx"))
    layouts = r"cannot run on packs: .*; .* in padded rows: .* one row at a time: "
    with pytest.raises(UserError, match=layouts + r".*; in float32 it is equal: set model\.dtype to float32$"):
        check_packing(make_policy(model, torch.bfloat16))
    check_packing(make_policy(model))


@pytest.mark.parametrize("reason", ["first choice", "requested"])
@pytest.mark.parametrize("layout", ["auto", "shared", "rows"])
def test_attention_that_computes_wrong_numbers_is_named(reason, layout, monkeypatch, caplog):
    """It is a fault of an installation, not of the model."""
    monkeypatch.setattr(interface, "native_attention", lambda query, key, value, *unused: 1.5 * query.transpose(1, 2))
    policy = make_policy(tiny_model("llama"))
    policy.backend = Backend("native", reason)
    words = "attention backend native gives wrong numbers here, and sdpa right ones: LlamaForCausalLM gives different"
    if layout == "shared" or (layout, reason) == ("auto", "requested"):
        with pytest.raises(BackendError, match=rf"^{words}.*; set model\.attention to sdpa, or install native anew$"):
            check_packing(policy, requested=layout)
        return
    check_packing(policy, requested=layout)
    assert policy.layout.kind == "rows"
    assert policy.backend == Backend("native", reason)
    assert [r.getMessage().startswith(words) for r in caplog.records] == [True] * (layout == "auto")


def test_sequences_beyond_learned_positions_are_named():
    policy = make_policy(tiny_model("gpt2"))
    check_dataset(policy, dataset(100, 128))
    message = (
        "row 1: prompt and response have 129 tokens, and GPT2LMHeadModel has 128 positions; set data.max_length to 128"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        check_dataset(policy, dataset(128, 129))


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_sequences_that_would_scale_the_positions_of_others_are_named(rope_type):
    scaling = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if rope_type == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    policy = make_policy(tiny_model("llama", rope_parameters=scaling))
    check_packing(policy)
    check_dataset(policy, dataset(64, 10))
    with pytest.raises(UserError, match=rf"row 0: .* 65 tokens, and LlamaForCausalLM scales all .*\({rope_type}\)"):
        check_dataset(policy, dataset(65, 10))


def test_plain_rotary_positions_have_no_limit():
    check_dataset(make_policy(tiny_model("llama")), dataset(1000))


def test_the_patches_of_a_vision_tower_are_no_limit_of_the_text():
    model = model_of(tiny_config("gemma3"))
    tables = [m.num_embeddings for n, m in model.named_modules() if n.endswith("position_embedding")]
    assert tables
    check_dataset(make_policy(model), dataset(2 * max(tables), 10))
