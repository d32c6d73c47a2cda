"""The forecast of time: a trial of the first layers, and what is assumed without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.config.schema import ModelConfig
from engine.data import load_dataset_groups
from engine.forecast import duration, shallow, trial
from engine.forecast.duration import forecast_duration
from engine.forecast.layout import find_layout
from engine.model import load_policy
from engine.model.layouts import use_layout
from engine.packing import plan_first_epoch, summarize_plan
from engine.train.throughput import FlopModel

CPU = torch.device("cpu")
RATE = 1e12
TRAINED = 1000


@pytest.fixture
def forecast(tiny_tokenizer, monkeypatch):
    """A forecast whose matrix products run at ``RATE``, and the FLOP model of the whole model."""
    monkeypatch.setattr(duration, "measure_matmul_rate", lambda device, dtype: RATE)

    def run(config):
        dataset = load_dataset_groups(config.data, tiny_tokenizer, split="train")[0]
        steps = plan_first_epoch(dataset, config)
        layout = find_layout(config, CPU).layout
        policy = load_policy(config.model, device=CPU)
        use_layout(policy, layout)
        run.plan = summarize_plan(dataset, config, steps, mixers=layout.mixer_blocks)
        options = {"trained_weights": TRAINED, "device": CPU, "layout": layout}
        return forecast_duration(config, dataset, steps, run.plan, FlopModel.of(policy), **options)

    return run


def test_layers_count_one_by_one(config, forecast, monkeypatch, tmp_path, tiny_tokenizer):
    deep = LlamaConfig.from_pretrained(config.model.model_name_or_path, num_hidden_layers=12)
    LlamaForCausalLM(deep).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    seconds = {1: 0.3, 2: 0.4}
    tried = []

    def measure(config, pack, device, layers, layout):
        tried.append((layers, pack.batch.num_tokens))
        return seconds[layers], 1e-6

    monkeypatch.setattr(trial, "_measure", measure)
    found = forecast(replace(config, model=replace(config.model, model_name_or_path=str(tmp_path))))
    assert [layers for layers, _ in tried] == [1, 2]
    assert found.trial.tokens == tried[0][1] == tried[1][1] <= 512
    updates = 6 * TRAINED * 1e-6
    assert found.seconds == pytest.approx(found.flop / found.trial.pack_flop_per_second + updates)
    # The pack takes 0.3 s for one layer and 0.1 s for each of the others.
    pack_flop = found.trial.pack_flop_per_second * (0.3 + 11 * 0.1)
    packs = found.flop / pack_flop
    assert found.seconds == pytest.approx(packs * 1.4 + updates)
    assert found.efficiency == pytest.approx(found.flop / (found.seconds * RATE))


def test_a_real_trial(config, forecast):
    checkpointed = replace(config, train=replace(config.train, gradient_checkpointing=True))
    for found in map(forecast, (config, checkpointed)):
        assert found.seconds > 0
        # A busy machine may be slower with one layer than with two.
        assert found.trial is not None or found.untried == "the second layer took no time in the trial"


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 3), (0.04, 8), (0.001, 30)])
def test_short_steps_are_repeated(config, forecast, monkeypatch, seconds, rounds):
    """Of three steps of some milliseconds not even the fastest is always as fast."""
    now, counts = [0.0], []
    monkeypatch.setattr(trial, "_now", lambda device: now.append(now[-1] + seconds) or now[-1])
    measure = trial._measure
    monkeypatch.setattr(trial, "_measure", lambda *given: (now.clear(), now.append(0.0), measure(*given),
                                                           counts.append(len(now) // 3))[2])  # fmt: skip
    forecast(config)
    assert counts == [rounds, rounds]


def test_layers_of_other_sizes_are_not_extrapolated(config, forecast, tmp_path, tiny_tokenizer):
    """The experts of DeepSeek come after some dense layers."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    mixture = DeepseekV3Config(
        vocab_size=len(tiny_tokenizer), num_hidden_layers=4, first_k_dense_replace=3, **shape, **ranks, **experts
    )
    DeepseekV3ForCausalLM(mixture).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    found = forecast(replace(config, model=replace(config.model, model_name_or_path=str(tmp_path))))
    assert (found.trial, found.untried) == (None, "the later layers are not like the second one")


def test_the_pack_is_cut_to_about_a_second(config, forecast, monkeypatch):
    sizes = []
    monkeypatch.setattr(trial, "_measure", lambda *given: (sizes.append(given[1].batch.num_tokens), (given[3], 0.0))[1])
    forecast(config)
    monkeypatch.setattr(trial, "_SECONDS", 1e-9)
    forecast(config)
    assert 0 < sizes[-1] < sizes[0] / 2


def test_without_room_the_efficiency_is_assumed(config, forecast, monkeypatch):
    monkeypatch.setattr(shallow, "free_bytes", lambda device: 2**20)
    found = forecast(config)
    assert found.trial is None
    assert found.efficiency == pytest.approx(0.5)
    assert found.untried.startswith("two layers would take ")
    checkpointed = forecast(replace(config, train=replace(config.train, gradient_checkpointing=True)))
    assert checkpointed.seconds == pytest.approx(found.seconds * 4 / 3)


def test_an_empty_model_of_fewer_layers(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=50, num_hidden_layers=4, head_dim=16, **shape)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    policy = load_policy(ModelConfig(model_name_or_path=str(tmp_path)), device=CPU, empty=True, layers=2)
    assert len(policy.causal_lm.model.layers) == policy.config.num_hidden_layers == len(policy.config.layer_types) == 2


@pytest.fixture
def hybrid(config, tmp_path, tiny_tokenizer):
    """A run of a model of twelve layers, three convolutions and one of attention in turn."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["conv", "conv", "conv", "full_attention"] * 3
    model = Lfm2Config(vocab_size=len(tiny_tokenizer), num_hidden_layers=12, layer_types=kinds, **shape)
    Lfm2ForCausalLM(model).save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer.save_pretrained(tmp_path / "hybrid")
    return replace(config, model=replace(config.model, model_name_or_path=str(tmp_path / "hybrid")))


def test_layers_that_take_turns_are_tried_by_the_turn(hybrid, forecast, monkeypatch):
    tried = []

    def measure(config, pack, device, layers, layout):
        batch = pack.batch
        tried.append((layers, layout.mixers, batch.rows_plan.num_cells > batch.num_tokens))
        return {3: 0.3, 6: 0.4}[layers], 1e-6

    monkeypatch.setattr(trial, "_measure", measure)
    found = forecast(hybrid)
    assert tried == [(layers, ("Lfm2ShortConv",), True) for layers in (3, 6)]
    # Three convolutions take 0.3 s; the nine layers behind them are three times what the next three are.
    pack_flop = found.trial.pack_flop_per_second * (0.3 + 3 * 0.1)
    assert found.seconds == pytest.approx(found.flop / pack_flop * 0.6 + 6 * TRAINED * 1e-6)


def test_what_mixers_compute_beyond_the_pack_takes_time(hybrid, forecast, monkeypatch):
    monkeypatch.setattr(trial, "_BYTES_PER_WEIGHT", 2**40)
    found = forecast(hybrid)
    assert found.untried.startswith("6 layers would take ")
    weights = 9 * (4 * 32 + 3) * 32
    plan = forecast.plan
    more = 6 * weights * (plan.mixer_cells - plan.packed_tokens) * plan.total_steps / plan.steps_per_epoch
    assert plan.mixer_cells > plan.unshared_tokens > plan.packed_tokens
    assert found.seconds == pytest.approx((found.flop + more) / (RATE * 0.5))
