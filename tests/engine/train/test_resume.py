"""A run that was stopped or damaged ends with the bits of one that was not, or says what is wrong.

Kills and full disks are in ``tests/engine/kills``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from engine.config import load_config
from engine.errors import UserError
from engine.run_folder import only_writer
from engine.train.checkpoint import complete_checkpoints, read_state
from engine.train.loop import train
from engine.train.resume import find_start
from engine.train.trackers import JsonlTracker
from tests.engine.train.conftest import default_config

PERF = "perf/"


def run_files(run: Path) -> dict[str, bytes]:
    """The final weights, and the metrics apart from speeds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith(PERF)} for row in rows]
    weights = {p.name: p.read_bytes() for p in run.glob("*.safetensors")}
    assert weights
    return {**weights, "metrics": json.dumps(kept).encode()}


def next_start(config, run: Path) -> int:
    """The step that a resume continues after, without the resume; 0 at the start."""
    start, _ = find_start(config, run, True)
    return start.step if start else 0


@contextmanager
def interrupted_after(monkeypatch: pytest.MonkeyPatch, rows: int) -> Iterator[None]:
    """Stop a run in this process, as Ctrl-C does, after some rows of metrics."""
    log, seen = JsonlTracker.log, []

    def counted(tracker, step, values):
        log(tracker, step, values)
        seen.append(step)
        if len(seen) == rows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonlTracker, "log", counted)
        yield


def assert_resumes_exactly(make_config, tmp_path, monkeypatch, **sections) -> None:
    """A run that is interrupted after a checkpoint and resumed ends with the bits of one that is not."""
    settings = {"num_train_epochs": 3, "save_steps": 5, "logging_steps": 2}
    train(make_config(**sections, train={**settings, "output_dir": str(tmp_path / "whole")}))
    config = make_config(**sections, train={**settings, "output_dir": str(tmp_path / "stopped")})
    with interrupted_after(monkeypatch, rows=4), pytest.raises(KeyboardInterrupt):
        train(config)
    assert train(config, resume=True).resumed_from == 5
    assert run_files(tmp_path / "stopped") == run_files(tmp_path / "whole")


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"lora": {"r": 4, "dropout": 0.3}}},
        {"model": {"lora": {"r": 4, "target_modules": ["v_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}}},
        {"model": {"dtype": "bfloat16"}, "loss": {"loss_type": "aot"}},
        {"loss": {"loss_type": "kto"}, "packing": {"tokens_per_pack": 250}},
        {"reference": {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.4}},
        {"optim": {"optimizer": "rmsprop", "lr_scheduler_type": "cosine", "warmup_steps": 3, "learning_rate": 1e-4}},
    ],
    ids=[
        "lora with dropout",
        "adapted head and copies",
        "bfloat16 and coupled pairs",
        "unpaired rows",
        "a moving reference",
        "rmsprop",
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(sections, make_config, tmp_path, monkeypatch):
    assert_resumes_exactly(make_config, tmp_path, monkeypatch, **sections)


def test_adapters_on_stacked_experts_resume_to_the_same_bits(make_config, tmp_path, monkeypatch, tiny_mixture_dir):
    lora = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = {"model_name_or_path": str(tiny_mixture_dir), "lora": lora}
    assert_resumes_exactly(make_config, tmp_path, monkeypatch, model=model)


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(make_config, tmp_path, monkeypatch):
    train(make_config(train={"output_dir": str(tmp_path / "whole")}))
    config = make_config(train={"output_dir": str(tmp_path / "stopped")})
    with interrupted_after(monkeypatch, rows=2), pytest.raises(KeyboardInterrupt):
        train(config)
    with pytest.raises(UserError, match=r"already holds a run \(config\.yaml\).*--resume"):
        train(config)
    assert train(config, resume=True).resumed_from is None
    assert run_files(tmp_path / "stopped") == run_files(tmp_path / "whole")


def test_every_checkpoint_resumes_to_the_same_bits(make_config, tmp_path):
    config = make_config(train={"num_train_epochs": 2, "save_steps": 1, "logging_steps": 3})
    run = tmp_path / "run"
    train(config)
    expected = run_files(run)
    checkpoints = complete_checkpoints(run)
    assert [step for step, _ in checkpoints] == list(range(1, 9))
    for step, _ in reversed(checkpoints):
        (run / "manifest.json").unlink()
        for later in range(step + 1, 9):
            shutil.rmtree(run / f"checkpoint-{later}", ignore_errors=True)
        assert train(config, resume=True).resumed_from == step
        assert run_files(run) == expected


def test_a_finished_run_is_left_alone(make_config, tmp_path):
    config = make_config(train={"save_steps": 2})
    train(config)
    before = run_files(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("edited by its owner")
    result = train(config, resume=True)
    assert result.steps == 4
    assert result.metrics["loss"] > 0
    assert run_files(tmp_path / "run") == before
    assert (tmp_path / "run" / "README.md").read_text() == "edited by its owner"


def test_two_processes_do_not_share_a_run_folder(make_config, tmp_path):
    config = make_config()
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"), pytest.raises(UserError, match=r"run is in use by another training process"):
        train(config)
    assert train(config).steps == 4


def test_resume_in_an_empty_folder_starts_a_run(make_config, tmp_path):
    assert train(make_config(), resume=True).steps == 4


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("optim", "learning_rate", 1e-4), ("loss", "beta", 0.2), ("packing", "pairs_per_step", 4), ("train", "seed", 7)],
)
def test_a_setting_that_changes_the_training_is_named(section, key, value, make_config, tmp_path):
    config = make_config(train={"save_steps": 2})
    train(config)
    changed = make_config(**{"train": {"save_steps": 2}, section: {key: value}})
    with pytest.raises(UserError, match=rf"{section}\.{key} was .* and is now {value}.*changes the training"):
        train(changed, resume=True)


def test_settings_that_change_nothing_learned_may_change(make_config, tmp_path):
    config = make_config(train={"save_steps": 2})
    train(config)
    (tmp_path / "run" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    other = make_config(packing={"tokens_per_pack": 800}, train={"save_steps": 3, "logging_steps": 2})
    assert train(other, resume=True).resumed_from == 2


def test_changed_data_is_refused_before_the_model_is_loaded(make_config, pairs_jsonl, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    shutil.copy(pairs_jsonl, data)
    config = make_config(data={"dataset_name": str(data)}, train={"save_steps": 2})
    train(config)
    (tmp_path / "run" / "manifest.json").unlink()
    data.write_text(data.read_text().replace("yes", "sure", 1))
    monkeypatch.setattr("engine.model.ready.load_policy", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"training data is not what it was \(rows, tokenizer or chat template changed"):
        train(config, resume=True)
    shorter = make_config(data={"dataset_name": str(data), "max_length": 40}, train={"save_steps": 2})
    with pytest.raises(UserError, match=r"not what it was \(data\.max_length was 160 and is now 40\)"):
        train(shorter, resume=True)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_changed_starting_model_is_refused(lora, make_config, tiny_model_dir, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = make_config(model={"model_name_or_path": str(base), "lora": lora}, train={"save_steps": 2})
    train(config)
    (tmp_path / "run" / "manifest.json").unlink()
    weights = load_file(base / "model.safetensors")
    save_file({n: w + 0.01 for n, w in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("engine.train.setup.prepare_references", lambda *a, **k: pytest.fail("references"))
    with pytest.raises(UserError, match=r"model_name_or_path=.*base holds other weights than when the run began"):
        train(config, resume=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, pairs_jsonl, store_dir):
    """A run with checkpoints of steps 2 and 4, and its configuration; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    config = default_config(folder, tiny_model_dir, pairs_jsonl, store_dir, train={"save_steps": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
        train(config)
    return folder / "run"


@pytest.fixture
def unfinished(finished, make_config, tmp_path):
    """A copy of ``finished`` that lacks the final model, and its configuration."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "manifest.json").unlink()
    return run, make_config(train={"save_steps": 2})


def places(content: bytes, count: int = 24) -> list[int]:
    """Positions spread over a file, its ends included."""
    return sorted({round(i * (len(content) - 1) / (count - 1)) for i in range(count)})


def test_a_byte_flipped_anywhere_in_a_checkpoint_is_named(unfinished):
    """Every file, the manifest included: the first and the last byte, and some in every region between."""
    run, config = unfinished
    folder = run / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "random_state.safetensors", "trainer_state.json"} <= names
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for position in places(good):
            path.write_bytes(good[:position] + bytes([good[position] ^ 0x01]) + good[position + 1 :])
            with pytest.raises(UserError) as error:
                next_start(config, run)
            # A manifest that is damaged may blame the file that it speaks of.
            assert str(folder) in str(error.value), position
            assert path.name == "manifest.json" or str(path) in str(error.value), position
            assert f"delete {folder} and continue from {run / 'checkpoint-2'} with --resume" in str(error.value)
            assert "\n" not in str(error.value)
        path.write_bytes(good)
    assert next_start(config, run) == 4


def altered(document: Any) -> Iterator[Any]:
    """``document`` with one field after another dropped, and one after another changed; of a list the first item."""
    if isinstance(document, dict):
        for key, item in document.items():
            yield {k: v for k, v in document.items() if k != key}
            yield from ({**document, key: changed} for changed in altered(item))
    elif isinstance(document, list) and document:
        yield document[1:]
        yield from ([changed, *document[1:]] for changed in altered(document[0]))
    else:
        yield document + 1 if isinstance(document, int | float) else f"{document}x"


def altered_tensors(content: bytes) -> Iterator[bytes]:
    """A safetensors file with one tensor after another dropped, and one number of each changed."""
    tensors = load(content)
    for name, tensor in tensors.items():
        yield save({k: v for k, v in tensors.items() if k != name}, metadata={"format": "pt"})
        changed = tensor.clone()
        changed.view(-1)[-1:].view(torch.uint8)[0] ^= 1
        yield save({**tensors, name: changed}, metadata={"format": "pt"})


def test_every_field_of_a_checkpoint_is_checked(unfinished):
    """Every value of state, settings, tokenizer, weights, optimizer and generators in turn: named, or a manifest that
    still tells of what is read."""
    run, config = unfinished
    folder = run / "checkpoint-4"
    whole, messages = read_state(folder), set()
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        if path.suffix == ".safetensors":
            variants = altered_tensors(good)
        elif path.suffix == ".json" and path.name != "tokenizer.json":
            variants = (json.dumps(d, indent=1).encode() for d in altered(json.loads(good)))
        else:
            variants = iter([good + b" ", good[1:]])
        for damaged in variants:
            path.write_bytes(damaged)
            try:
                state = read_state(folder)
            except UserError as error:
                messages.add(str(error))
            else:
                assert path.name == "manifest.json", f"{path.name}: {damaged[:200]!r}"
                assert state == whole
        path.write_bytes(good)
    remedy = f"; delete {folder} and continue from {run / 'checkpoint-2'} with --resume"
    assert all(message.startswith(str(folder)) and message.endswith(remedy) for message in messages)
    assert len(messages) > len(list(folder.iterdir()))
    assert next_start(config, run) == 4


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_checkpoint_file_that_is_not_whole_is_named(damage, unfinished):
    run, config = unfinished
    folder = run / "checkpoint-4"
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(good[: len(good) // 2] if damage == "truncated" else b"")
        with pytest.raises(
            UserError, match=re.escape(str(path)) + r" (is damaged: it (has [\d,]+ bytes|is no)|is missin)"
        ):
            next_start(config, run)
        path.write_bytes(good)
    assert next_start(config, run) == 4


def test_what_belongs_to_another_checkpoint_is_named(unfinished):
    run, config = unfinished
    newer, older = run / "checkpoint-4", run / "checkpoint-2"
    good = (newer / "manifest.json").read_bytes()
    shutil.copy(older / "manifest.json", newer / "manifest.json")
    with pytest.raises(UserError, match=r"checkpoint-4/\S+ is damaged: .*; delete .*checkpoint-4 and continue from"):
        next_start(config, run)
    (newer / "manifest.json").write_bytes(good)
    for name in ("model.safetensors", "optimizer.safetensors", "trainer_state.json"):
        kept = (newer / name).read_bytes()
        shutil.copy(older / name, newer / name)
        with pytest.raises(UserError, match=rf"checkpoint-4/{name} is damaged"):
            next_start(config, run)
        (newer / name).write_bytes(kept)
    shutil.copytree(older, run / "checkpoint-6")
    with pytest.raises(UserError, match=r"checkpoint-6 holds the checkpoint of step 2: delete it"):
        next_start(config, run)


def test_following_the_advice_continues_from_the_older_checkpoint(finished, unfinished):
    run, config = unfinished
    (run / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer\.safetensors is damaged: it has 0 bytes"):
        train(config, resume=True)
    shutil.rmtree(run / "checkpoint-4")
    assert train(config, resume=True).resumed_from == 2
    assert run_files(run) == run_files(finished)
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-2" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged.*start anew, since there is no earlier checkpoint"):
        train(config, resume=True)
    shutil.rmtree(run / "checkpoint-2")
    assert train(config, resume=True).resumed_from is None
    assert run_files(run) == run_files(finished)


def test_a_damaged_final_model_is_named_and_written_again(finished, make_config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    weights = run / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    config = make_config(train={"save_steps": 2})
    with pytest.raises(UserError, match=r"run/model\.safetensors is damaged: .*; delete this file to have the model"):
        train(config, resume=True)
    weights.unlink()
    assert train(config, resume=True).resumed_from == 4
    assert run_files(run) == run_files(finished)


def test_a_full_disk_at_the_very_end_leaves_no_half_model(make_config, tmp_path, monkeypatch):
    config = make_config(train={"save_steps": 3})
    replace_file = os.replace

    def full(source, target):
        if str(target).endswith("run/model.safetensors"):
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        train(config)
    run = tmp_path / "run"
    assert not (run / "config.json").exists()
    assert not (run / "model.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.setattr("engine.train.setup.measure_matmul_rate", lambda device, dtype: 1e12)
    assert train(config, resume=True).resumed_from == 4
    assert (run / "model.safetensors").exists()


def test_old_checkpoints_go_only_when_the_next_one_is_there(make_config, tmp_path, monkeypatch):
    config = make_config(train={"save_steps": 1, "save_total_limit": 1})
    from engine.train import checkpoint

    save, seen = checkpoint.save_checkpoint, []

    def spy(output_dir, *arguments, **options):
        seen.append([step for step, _ in complete_checkpoints(output_dir)])
        return save(output_dir, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", spy)
    train(config)
    assert seen == [[], [1], [2], [3]]
    assert [step for step, _ in complete_checkpoints(tmp_path / "run")] == [4]


def test_the_written_configuration_is_the_one_that_ran(make_config, tmp_path):
    config = make_config()
    train(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    other = replace(config, train=replace(config.train, output_dir=str(tmp_path / "run" / "metrics.jsonl")))
    with pytest.raises(UserError, match="is a file: give a folder"):
        train(other)


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_rows_of_an_earlier_start_train_to_the_same_bits(make_config, tmp_path):
    found = []
    for cache in ("none", str(tmp_path / "cache"), str(tmp_path / "cache")):
        place = str(tmp_path / str(len(found)))
        train(make_config(data={"cache": cache}, train={"output_dir": place, "max_steps": 2}))
        found.append(run_files(Path(place)))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert found[0] == found[1] == found[2]
