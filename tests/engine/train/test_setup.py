"""What a run says before its first step."""

from __future__ import annotations

import shutil

from transformers import AutoModelForCausalLM

from engine.reference import keys
from engine.train.describe import describe_run
from engine.train.setup import prepare


def test_weights_are_read_once(make_config, tiny_model_dir, tmp_path, monkeypatch):
    """Bytes that are hashed at the start: of each model once, whether its references are stored or not."""
    read = []
    digest = keys._tensor_digest
    monkeypatch.setattr(keys, "_tensor_digest", lambda tensor: read.append(tensor.nbytes) or digest(tensor))
    store = {"store": str(tmp_path / "store")}
    for _ in range(2):
        setup = prepare(make_config(reference=store))
        size = sum(p.nbytes for p in setup.policy.parameters())
        assert sum(read) == size
        read.clear()
    prepare(make_config(reference={**store, "model_name_or_path": str(tiny_model_dir)}))
    assert sum(read) == 2 * size


def test_what_saves_nothing_on_the_cpu_is_said(make_config):
    words = describe_run(prepare(make_config(optim={"offload": True}, train={"activation_offload": True})))
    assert "optim.offload saves nothing on the CPU" in words
    assert "train.activation_offload saves nothing on the CPU" in words
    assert "saves nothing" not in describe_run(prepare(make_config()))


def test_dropout_is_disabled_and_counted(make_config, tiny_model_dir, tmp_path):
    assert "disabled in the model (it had none)" in describe_run(prepare(make_config()))
    folder = tmp_path / "dropping"
    shutil.copytree(tiny_model_dir, folder)
    AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.1).save_pretrained(folder)
    setup = prepare(make_config(model={"model_name_or_path": str(folder)}))
    assert "disabled in the model (2 probabilities set to 0)" in describe_run(setup)
