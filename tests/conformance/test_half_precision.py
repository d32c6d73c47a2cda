"""Families in bfloat16 on stand-ins that refuse what CUDA libraries refuse (``tests/engine/model/stand_ins.py``)."""

from __future__ import annotations

import pytest

from engine.model.attention import Backend
from tests.conformance.families import EXPERTS, tiny_config, tiny_model
from tests.conformance.half_precision import try_half_precision
from tests.conformance.table import read_rows
from tests.engine.model import stand_ins

BACKENDS = [
    Backend("flash3", "test", ("flash", "sdpa")),
    Backend("flash", "test", ("sdpa",)),
    Backend("varlen", "test", ("sdpa",)),
    Backend("sdpa", "test"),
]
SLICE = [
    "llama",  # rotary embedding of float32 residuals
    "qwen2",
    "mistral",  # windows
    "gemma2",  # windows, capped scores and logits
    "gemma3_text",  # norms of queries and keys
    "gemma4_text",  # layers of two head dimensions, 256 and 512
    "gemma4",  # the same inside a composite
    "gpt2",  # fused projections, learned positions
    "gpt_oss",  # attention sinks, experts
    "deepseek_v3",  # latent attention: values narrower than keys
    "llama4_text",  # chunks
    "qwen2_moe",  # a window that only the mask knows, experts
    "phi",
    "olmo2",
]


OWN_FORWARD_FAILS = {("dbrx", False)}
"""Families that transformers itself cannot run with float32 weights under autocast."""


def check(monkeypatch, model_type: str, *, lora: bool, backends: list[Backend]) -> None:
    stand_ins.install(monkeypatch)
    # every token goes to every expert: rounding that changes a route changes everything after it
    model = tiny_model(tiny_config(model_type, picked=EXPERTS))
    found = try_half_precision(model, backends, lora=lora)
    assert found == {backend.name: [] for backend in backends}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", SLICE)
def test_as_near_as_its_own_forward(monkeypatch, model_type, lora):
    check(monkeypatch, model_type, lora=lora, backends=BACKENDS[1:3] if lora else BACKENDS)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", [row["model type"] for row in read_rows() if row["layout"] == "shared"])
def test_every_equal_family(monkeypatch, model_type, lora):
    if (model_type, lora) in OWN_FORWARD_FAILS:
        with pytest.raises(RuntimeError, match="same scalar type"):
            check(monkeypatch, model_type, lora=lora, backends=BACKENDS)
        return
    check(monkeypatch, model_type, lora=lora, backends=BACKENDS)
