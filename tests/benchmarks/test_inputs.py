"""Inputs of the benchmarks: real states keep their logits, and the softmax is described as it is."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import inputs as module
from benchmarks.inputs import HeadInputs, States, fit, make_inputs, read_states, softmax_shape
from benchmarks.shapes import HeadShape


@pytest.fixture
def states() -> States:
    torch.manual_seed(0)
    hidden = torch.randn(32, 12) + 1.0
    return States(hidden, torch.randn(50, 12), torch.randint(0, 50, (32,)), "a model")


def test_fit_keeps_the_models_own_logits(states: States) -> None:
    placed = fit(states, HeadShape(32, 20, 130), torch.Generator().manual_seed(0))
    assert placed.hidden.shape == (32, 20)
    assert placed.weight.shape == (130, 20)
    torch.testing.assert_close(
        placed.hidden @ placed.weight[:50].T, states.hidden @ states.weight.T, atol=1e-4, rtol=1e-4
    )
    added = (placed.hidden @ placed.weight.T).exp()
    share = added[:, 50:].sum() / added[:, :50].sum()
    assert 0.05 < share < 2
    assert "D=12 V=50" in placed.source


def test_fit_cuts_what_is_larger(states: States) -> None:
    placed = fit(states, HeadShape(16, 8, 30), torch.Generator())
    assert placed.hidden.shape == (16, 8)
    assert placed.weight.shape == (30, 8)
    assert placed.labels.max() < 30


def test_model_states(states: States, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """From a model folder: hidden state t predicts token t + 1 with the model's own log-probs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.end_to_end import generated_rows, save_model

    texts = [row["prompt"] + row["chosen"] for row in generated_rows(4)]
    save_model(tmp_path, texts)
    monkeypatch.setenv("DPO_BENCH_MODEL", str(tmp_path))
    monkeypatch.setattr(module, "default_texts", lambda: texts)
    found = module.model_states(40)
    assert found.source == f"hidden states of {tmp_path.name}"
    assert len(found.labels) == len(found.hidden) == 40
    assert len(read_states(tmp_path, 2000, texts[:1]).labels) == 2000
    ids = AutoTokenizer.from_pretrained(tmp_path)(texts[0], return_tensors="pt")["input_ids"][:, :41]
    logits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits[0]
    rows = slice(0, ids.shape[1] - 1)
    torch.testing.assert_close(found.hidden[rows] @ found.weight.T, logits[rows].detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.labels[rows], ids[0, 1:])


def test_inputs_are_whole_pairs() -> None:
    inputs = make_inputs("random", HeadShape(24, 6, 40), length=3)
    assert inputs.cu_responses.tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert inputs.shape == HeadShape(24, 6, 40)
    half = inputs.to("cpu", torch.bfloat16)
    assert half.hidden_ND.dtype == half.weight_VD.dtype == half.ref_hidden_ND.dtype == torch.bfloat16
    assert half.labels_N.dtype == torch.int64
    with pytest.raises(AssertionError, match="no whole pairs"):
        make_inputs("random", HeadShape(24, 6, 40), length=5)


def test_softmax_shape() -> None:
    """Uniform over 8 of 512 tokens: entropy ln 8, one of two 256-column tiles survives beside the labels' own."""
    weight = torch.full((512, 1), -100.0)
    weight[:8] = 0.0
    hidden = torch.ones(256, 1)
    inputs = HeadInputs(hidden, weight, torch.full((256,), 3), hidden, 1, "made up")
    found = softmax_shape(inputs)
    assert found.entropy == pytest.approx(math.log(8), abs=1e-5)
    assert found.nll == pytest.approx(math.log(8), abs=1e-5)
    assert found.surviving == 0.5
