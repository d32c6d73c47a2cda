"""Which device a forecast is for, and that one which is not there is forecast for as if it were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.errors import UserError
from engine.forecast import Target
from engine.forecast.memory import forecast_pack
from engine.model.attention import choice
from tests.engine.forecast.large import groups, run_config, save_config

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
ABSENT = Target.of_kind("cuda", 1)
GIB = 2**30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return run_config(save_config(tmp_path_factory.mktemp("small") / "model", **SMALL))


def test_a_kind_of_device_is_here_or_absent():
    assert Target.of_kind(None, 1).kind == Target.here().device.type
    assert Target.of_kind("cpu", 2) == Target(torch.device("cpu"), "cpu", 2)
    assert ABSENT.absent != torch.cuda.is_available()


@pytest.mark.parametrize(
    ("attention", "dtype", "name"),
    [
        ("auto", "bfloat16", "varlen"),
        ("flash", "bfloat16", "varlen"),
        ("flex", "bfloat16", "flex"),
        ("sdpa", "bfloat16", "sdpa"),
        ("auto", "float32", "sdpa"),
    ],
)
def test_attention_of_an_absent_device(attention, dtype, name, config):
    asked = replace(config, model=replace(config.model, attention=attention, dtype=dtype))
    assert ABSENT.backend(asked).name == name
    with pytest.raises(UserError, match="native runs on the CPU"):
        ABSENT.backend(replace(config, model=replace(config.model, attention="native")))


def test_what_runs_is_what_a_gpu_runs(config, monkeypatch):
    """Flash attention and the Triton head, whatever this machine has; no kernel is tried."""
    asked = []
    monkeypatch.setattr(choice, "_probe", lambda *arguments: asked.append(arguments))
    found = forecast_pack(config, groups(4096), several=False, target=ABSENT)
    here = forecast_pack(config, groups(4096), several=False, target=Target.on(torch.device("cpu")))
    assert asked == []
    assert found.backend == "varlen"
    assert found.process == 0
    # The head in bfloat16, and float32 sums of flash attention's backward pass.
    rows, heads, width = 4096 + 128 * 8, 4, 64
    assert found.workspace >= 4 * rows * heads * (width + 1)
    assert found.workspace != here.workspace
    assert found.weights == here.weights


def test_capped_scores_are_not_held(tmp_path):
    """Layers that flash attention cannot compute hold what FlexAttention holds, and no scores."""
    sizes = {**SMALL, "num_hidden_layers": 1, "head_dim": 64}
    folder = save_config(tmp_path / "gemma2", model_type="gemma2", sliding_window=1024, **sizes)
    found = {
        name: forecast_pack(run_config(folder, attention=name), groups(4096), several=False, target=ABSENT)
        for name in ("auto", "flex", "sdpa")
    }
    assert found["auto"].activations == found["flex"].activations < found["sdpa"].activations / 2
    assert found["auto"].backend == "varlen"


def test_a_device_gives_more_than_tensors_take():
    assert Target.on(torch.device("cpu")).needed(10 * GIB) == 10 * GIB
    assert ABSENT.needed(10 * GIB) == int((10 * 1.05 + 0.7) * GIB)
    assert replace(ABSENT, processes=4).needed(7 * GIB) == int((7 * 1.05 + 0.7 + 0.8) * GIB)
