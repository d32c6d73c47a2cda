"""Kernels, and processes that divide a run, from every trainer's files."""

from __future__ import annotations

import pytest

from engine.errors import UserError

from .recipes import TRL, convert, notes, written

AXOLOTL = "base_model: m\nrl: dpo\nlearning_rate: 1.0e-5\ndatasets:\n- {path: d}\n"
SWIFT = "swift rlhf --rlhf_type dpo --model m --dataset d --tuner_type full"
OPEN_INSTRUCT = "model_name_or_path: m\nmixer_list: [d, 1.0]\nmax_seq_length: 2048\n"
KEYS = ("model.kernels", "train.context_parallel", "train.shards_per_replica", "packing.pairs_per_step")


@pytest.mark.parametrize(
    ("file", "text", "processes", "expected"),
    [
        ("trl.yaml", TRL + "use_liger_kernel: true\n", None, {"model.kernels": "liger"}),
        ("trl.yaml", TRL + "use_liger_kernel: true\ntorch_compile: true\n", None, {"model.kernels": "liger"}),
        ("trl.yaml", TRL + "use_liger_kernel: false\ntorch_compile: true\n", None, {"model.kernels": "compile"}),
        ("trl.yaml", TRL + "parallelism_config: {cp_size: 2}\n", 4,
         {"train.context_parallel": 2, "packing.pairs_per_step": 16}),
        ("trl.yaml", TRL + "parallelism_config: {parallelism_config_cp_size: 2, parallelism_config_dp_shard_size: 2, "
         "parallelism_config_dp_replicate_size: 2}\n", 8,
         {"train.context_parallel": 2, "train.shards_per_replica": 4, "packing.pairs_per_step": 32}),
        ("trl.yaml", TRL + "fsdp: [no_shard]\n", 2, {"train.shards_per_replica": 1, "packing.pairs_per_step": 16}),
        ("trl.yaml", TRL + "fsdp: full_shard\nfsdp_config: {fsdp_sharding_strategy: 3}\n", 2,
         {"train.shards_per_replica": 1, "packing.pairs_per_step": 16}),
        ("ax.yml", AXOLOTL + "liger_rms_norm: true\ncontext_parallel_size: 2\ndp_shard_size: 2\ndp_replicate_size: 2\n"
         "micro_batch_size: 3\ngradient_accumulation_steps: 1\n", 8,
         {"model.kernels": "liger", "train.context_parallel": 2, "train.shards_per_replica": 4,
          "packing.pairs_per_step": 12}),
        ("ax.yml", AXOLOTL + "sequence_parallel_degree: 2\ntorch_compile: true\n", None,
         {"model.kernels": "compile", "train.context_parallel": 2}),
        ("ax.yml", AXOLOTL + "context_parallel_size: 1\nliger_rope: false\ndp_shard_size: 4\n", None, {}),
        ("oi.yaml", OPEN_INSTRUCT + "use_liger_kernel: true\ncontext_parallel_degree: 2\nfsdp_shard_degree: 2\n"
         "fsdp_num_replicas: 4\n", None,
         {"model.kernels": "liger", "train.context_parallel": 2, "train.shards_per_replica": 4}),
        ("swift.sh", SWIFT + " --sequence_parallel_size 2 --use_liger_kernel true", None,
         {"model.kernels": "liger", "train.context_parallel": 2}),
    ],
)  # fmt: skip
def test_kernels_and_sizes_are_converted(file, text, processes, expected, tmp_path):
    conversion = convert(tmp_path / file, text, num_processes=processes)
    found = written(conversion, tmp_path)
    keys = KEYS if processes else KEYS[:-1]
    assert {key: found[key] for key in keys if key in found} == expected


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (TRL + "use_liger_kernel: true\n", "use_liger_kernel", "its layers, and never its loss"),
        (TRL + "use_liger_kernel: true\ntorch_compile: true\n", "torch_compile", "one kind of kernels"),
        (TRL + "fsdp: hybrid_shard auto_wrap\n", "fsdp", "the GPUs of a machine"),
        (TRL + "parallelism_config: {tp_size: 2}\n", "parallelism_config", "products are not divided"),
        (TRL + "liger_kernel_config: {rope: false}\n", "liger_kernel_config", "never by Liger"),
        (AXOLOTL + "liger_rope: true\ntorch_compile: true\n", "torch_compile", "one kind of kernels"),
        (AXOLOTL + "dp_replicate_size: 2\n", "dp_replicate_size", "set train.shards_per_replica to the processes of"),
    ],
)
def test_what_is_not_taken_over_is_said(text, key, words, tmp_path):
    conversion = convert(tmp_path / "other.yaml", text)
    assert words in " ".join(note.text for note in conversion.notes if note.key == key)
    assert not notes(conversion, "new").keys() & {key}


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("trl.yaml", TRL + "parallelism_config: {cp_size: two}\n", "expected a positive integer, got the string 'two'"),
        ("ax.yml", AXOLOTL + "context_parallel_size: 2\n", "3 processes are no multiple of train.context_parallel 2"),
    ],
)
def test_sizes_that_are_none_stop(file, text, words, tmp_path):
    with pytest.raises(UserError, match=words):
        convert(tmp_path / file, text, num_processes=3)
