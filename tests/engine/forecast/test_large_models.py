"""What fits where, of models whose config.json is all that is needed; and the parts of it, by arithmetic."""

from __future__ import annotations

import pytest

from engine.config.schema import LoraConfig
from engine.forecast import Target
from engine.forecast.memory import forecast_pack
from engine.model.replicas import BUCKET
from tests.engine.forecast.large import LLAMA_8B, LLAMA_70B, groups, run_config, save_config

GIB = 2**30
ONE = Target.of_kind("cuda", 1)
CHECKPOINTING = {"gradient_checkpointing": True}


def num_weights(hidden_size, intermediate_size, num_hidden_layers, vocab_size, **heads) -> tuple[int, int]:
    """Of linear layers in the blocks; of all the rest."""
    D, head_dim = hidden_size, hidden_size // heads["num_attention_heads"]
    linear = 2 * D * D + 2 * D * heads["num_key_value_heads"] * head_dim + 3 * D * intermediate_size
    return num_hidden_layers * linear, 2 * vocab_size * D + (2 * num_hidden_layers + 1) * D


def num_adapters(rank, hidden_size, intermediate_size, num_hidden_layers, **heads) -> int:
    D, K = hidden_size, hidden_size // heads["num_attention_heads"] * heads["num_key_value_heads"]
    return num_hidden_layers * rank * (2 * 2 * D + 2 * (D + K) + 3 * (D + intermediate_size))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("large")
    return {8: save_config(path / "8", **LLAMA_8B), 70: save_config(path / "70", **LLAMA_70B)}


def forecast(config, tokens, *, several=True, target=ONE):
    return forecast_pack(config, groups(tokens), several=several, target=target)


def test_full_fine_tuning_of_8b_fits_80_gib(folders):
    """Weights in bfloat16, rounded stochastically, and optimizer state of 8 bits."""
    optim = {"master_weights": "stochastic", "optimizer": "adamw_8bit"}
    found = forecast(run_config(folders[8], train=CHECKPOINTING, optim=optim), 8192)
    assert ONE.needed(found.peak) < 80 * GIB
    linear, rest = num_weights(**LLAMA_8B)
    embedding = LLAMA_8B["vocab_size"] * LLAMA_8B["hidden_size"]
    assert found.weights == pytest.approx(2 * (linear + rest), rel=1e-6)
    # Sums over the packs of a step are float32.
    assert found.gradients == pytest.approx(4 * (linear + rest), rel=1e-6)
    assert found.optimizer == pytest.approx(2 * (1 + 4 / 256) * (linear + rest - embedding) + 8 * embedding, rel=1e-3)
    # Of each layer its input, of which the last is there twice.
    assert found.activations == pytest.approx(33 * 8192 * 4096 * 2, rel=0.1)
    plain = forecast(run_config(folders[8], train=CHECKPOINTING), 8192)
    assert ONE.needed(plain.peak) > 120 * GIB


def test_lora_of_8b_fits_24_gib(folders):
    found = forecast(run_config(folders[8], train=CHECKPOINTING, lora=LoraConfig(r=16)), 8192)
    assert ONE.needed(found.peak) < 24 * GIB
    adapters = num_adapters(16, **{k: v for k, v in LLAMA_8B.items() if k != "vocab_size"})
    assert found.weights == pytest.approx(2 * sum(num_weights(**LLAMA_8B)) + 4 * adapters, rel=1e-6)
    assert found.gradients == pytest.approx(4 * adapters, rel=1e-6)
    assert found.optimizer == pytest.approx(8 * adapters, rel=1e-6)


def test_qlora_of_70b_fits_80_gib(folders):
    config = run_config(folders[70], train=CHECKPOINTING, lora=LoraConfig(r=16), quantization="nf4")
    found = forecast(config, 8192)
    assert ONE.needed(found.peak) < 80 * GIB
    linear, rest = num_weights(**LLAMA_70B)
    adapters = num_adapters(16, **{k: v for k, v in LLAMA_70B.items() if k != "vocab_size"})
    four_bits = linear * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    assert found.weights == pytest.approx(four_bits + 2 * rest + 4 * adapters, rel=1e-4)
    # The largest weight is there in bfloat16 while it is multiplied with.
    assert found.workspace >= 2 * LLAMA_70B["hidden_size"] * LLAMA_70B["intermediate_size"]
    # Quantised weights are not sharded: each of several processes holds them all.
    assert forecast(config, 8192, target=Target.of_kind("cuda", 8)).weights == found.weights


def test_a_checkpoint_that_is_stored_quantised_is_whole_on_every_device(tmp_path):
    values = {**LLAMA_8B, "num_hidden_layers": 2, "quantization_config": {"quant_method": "fp8"}}
    config = run_config(save_config(tmp_path / "fp8", **values), lora=LoraConfig(r=16))
    alone, found = (forecast(config, 1024, target=Target.of_kind("cuda", n)) for n in (1, 8))
    assert (found.weights, found.gathered) == (alone.weights, 0)


def test_eight_devices_hold_an_eighth_each(folders):
    config = run_config(folders[8], train=CHECKPOINTING)
    found = forecast(config, 8192, target=Target.of_kind("cuda", 8))
    share = sum(num_weights(**LLAMA_8B)) / 8
    assert found.weights == pytest.approx(4 * share, rel=1e-4)
    assert found.gradients == pytest.approx(4 * share, rel=1e-4)
    assert found.optimizer == pytest.approx(8 * share, rel=1e-4)
    # The head is the largest unit: with the last block beside it, in float32.
    head = 4 * LLAMA_8B["vocab_size"] * LLAMA_8B["hidden_size"]
    assert 4 * head < found.gathered < 5 * head


def test_each_of_several_processes_holds_its_rows_of_8_bit_moments(folders):
    """Rows of Llama are whole blocks of 256, and four processes divide them evenly."""
    config = run_config(folders[8], train=CHECKPOINTING, optim={"optimizer": "adamw_8bit"})
    found = forecast(config, 2048, several=False, target=Target.of_kind("cuda", 4))
    linear, rest = num_weights(**LLAMA_8B)
    head = LLAMA_8B["vocab_size"] * LLAMA_8B["hidden_size"]
    # The embedding and the norms keep 32 bits.
    eight, kept = linear + head, rest - head
    assert found.optimizer == (8 * kept + 2 * (eight + 4 * eight // 256)) // 4


def test_whole_copies_on_several_devices_add_up_float32_gradients(folders):
    """In one pack they were bfloat16 before. Buckets are smaller than the embedding, which is cut."""
    train, optim = {**CHECKPOINTING, "shards_per_replica": 1}, {"master_weights": "stochastic"}
    config = run_config(folders[8], train=train, optim=optim)
    alone, found = (forecast(config, 2048, several=False, target=Target.of_kind("cuda", n)) for n in (1, 2))
    assert found.weights == alone.weights
    assert found.gradients == 2 * alone.gradients
    embedding = LLAMA_8B["vocab_size"] * LLAMA_8B["hidden_size"]
    beside = found.step_peak - found.weights - found.gradients - found.optimizer
    assert 3 * 4 * BUCKET <= beside < 3 * 4 * embedding
