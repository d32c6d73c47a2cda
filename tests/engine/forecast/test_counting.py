"""Bytes of a step, counted a second time: by what autograd saves, by FSDP itself, on all layers instead of a few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.config.schema import LoraConfig
from engine.forecast import Target
from engine.forecast.counting import Shapes
from engine.forecast.live_storage import LiveStorage, storage_bytes
from engine.forecast.memory import pack_of
from engine.forecast.weights import policy_without_data
from engine.model.division import gathered_dtype
from engine.model.policy import Layout
from engine.model.shard import transformer_blocks
from tests.engine.forecast.large import groups, run_config, save_config

ABSENT = Target.of_kind("cuda", 1)
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
MIXTURE = {
    **SMALL,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "head_dim": 32,
}
KINDS = {**SMALL, "model_type": "qwen3", "head_dim": 32, "use_sliding_window": True, "sliding_window": 64}
KINDS["layer_types"] = ["sliding_attention", "full_attention"] * 4
MODELS = {"llama": SMALL, "mixture": MIXTURE, "two kinds of layers": KINDS}
LORA = {"lora": LoraConfig(r=4)}
CHECKPOINTING = {"train": {"gradient_checkpointing": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    return {name: save_config(path / str(i), **values) for i, (name, values) in enumerate(MODELS.items())}


def shapes(config, *, several=False, processes=1, tokens=2048, prompt=128):
    pack = pack_of(config, groups(tokens, prompt=prompt, response=prompt // 2), Layout())
    return Shapes(config, pack, replace(ABSENT, processes=processes), Layout(), several)


@pytest.mark.parametrize(
    ("model", "options", "several", "processes"),
    [
        ("llama", {}, False, 1),
        ("llama", {}, True, 1),
        ("llama", CHECKPOINTING, False, 1),
        ("llama", {**LORA, **CHECKPOINTING}, True, 1),
        ("llama", {}, True, 4),
        ("mixture", {}, False, 1),
        ("two kinds of layers", {}, False, 1),
    ],
)
def test_a_few_layers_stand_for_all(model, options, several, processes, folders, monkeypatch):
    asked = shapes(run_config(folders[model], **options), several=several, processes=processes)
    counted = []
    count = Shapes.count
    monkeypatch.setattr(Shapes, "count", lambda self, layers: counted.append(layers) or count(self, layers))
    found = asked.count_all()
    assert counted == ([4, 6] if model == "two kinds of layers" else [2, 3])
    whole = asked.count(None)
    assert found.step_peak == pytest.approx(whole.step_peak, rel=1e-3)
    for name in ("weights", "gradients", "optimizer", "workspace", "gathered"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-4)
    assert found.activations == pytest.approx(whole.activations, rel=2e-3)


@pytest.mark.parametrize("options", [{}, CHECKPOINTING, LORA])
def test_activations_are_what_autograd_saves(options, folders):
    """Each storage once, weights and their copies in the compute dtype apart from them."""
    asked = shapes(run_config(folders["llama"], **options))
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = policy_without_data(asked.config, ABSENT)
        weights = {p.untyped_storage()._cdata for p in [*policy.parameters(), *policy.buffers()]}
        with saved_tensors_hooks(note, lambda tensor: tensor), policy.autocast():
            policy.hidden_states(asked.pack.batch)
    held = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    found = asked.count(None).activations
    # Checkpoints also keep what blocks are called with, such as positions, beside autograd.
    assert held <= found < (1.2 if options == CHECKPOINTING else 1.02) * held


def follow(function, count: LiveStorage):
    """FSDP frees and makes storages where no operator is to be seen."""

    def wrapped(tensor):
        function(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata in count._sizes:
            count.current += storage.nbytes() - count._sizes[storage._cdata]
            count._sizes[storage._cdata] = storage.nbytes()
            count._note(count.current)

    return wrapped


def fsdp_bytes(policy, batch, mesh, gathered, monkeypatch) -> tuple[int, int]:
    """What a process has of weights, and most beside its shares in two steps of FSDP, whose collectives do nothing."""
    precision = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model = policy.causal_lm
    head = model.get_output_embeddings()
    for unit in (*transformer_blocks(model), model.get_input_embeddings(), head, policy):
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    count = LiveStorage(torch.device("cpu"), lambda func, args: 0)
    for name in ("free_storage", "alloc_storage"):
        monkeypatch.setattr(_fsdp_param, name, follow(getattr(_fsdp_param, name), count))
    shares = count.watch([p._local_tensor for p in policy.parameters()])
    with count:
        for _ in range(2):
            policy(batch, lambda hidden, _: head(hidden)).sum().backward()
    # The gradients are float32, as the weights are.
    return shares + storage_bytes(policy.buffers()), count.peak - 2 * shares


@pytest.mark.parametrize(
    ("model", "processes", "gathered"),
    [("llama", 4, "float32"), ("llama", 4, "bfloat16"), ("mixture", 8, "float32")],
    ids=["rows", "rows, in bfloat16", "fewer experts than processes"],
)
def test_fsdp_holds_and_gathers_no_more_than_is_forecast(model, processes, gathered, folders, monkeypatch):
    config = run_config(folders[model], dtype=gathered, attention="sdpa", train={"param_dtype": gathered})
    # Few tokens, so that activations are small beside units.
    asked = shapes(config, tokens=16, prompt=8, processes=processes)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (processes,))
        with FakeTensorMode(allow_non_fake_inputs=True):
            policy, batch = policy_without_data(config, ABSENT), asked.pack.batch
            held, counted = fsdp_bytes(policy, batch, mesh, gathered_dtype(config), monkeypatch)
    finally:
        dist.destroy_process_group()
    found = asked.count(None)
    assert found.weights == held
    assert 0.85 * counted < found.gathered < 1.1 * counted
    assert replace(asked, target=ABSENT).count(None).gathered == 0
