"""The forecast of what a run writes is what it writes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from engine.errors import UserError
from engine.train.loop import train
from engine.train.setup import prepare
from engine.train.storage import check_disk, disk_need, save_points

MIB = 2**20


def tensor_bytes(folder) -> int:
    """Of all safetensors in a folder, but generators and counters of steps."""
    files = [path for path in folder.glob("*.safetensors") if not path.name.startswith("random")]
    tensors = {(path, name): tensor for path in files for name, tensor in load_file(path).items()}
    return sum(t.nbytes for (_, name), t in tensors.items() if not name.startswith("step/"))


@pytest.mark.parametrize(
    ("model", "optimizer", "train_section", "reference"),
    [
        ({}, "adamw", {}, {}),
        ({}, "rmsprop", {"save_dtype": "bfloat16"}, {}),
        ({"lora": {"r": 4}}, "adamw", {"save_dtype": "bfloat16"}, {}),
        ({"dtype": "bfloat16"}, "adamw", {}, {"sync_ref_model": True}),
        ({}, "adamw_8bit", {}, {}),
    ],
    ids=["full", "rmsprop, bfloat16", "lora, bfloat16", "computed in bfloat16, beside a moving reference", "8 bits"],
)
def test_the_forecast_is_what_is_written(model, optimizer, train_section, reference, make_config, tmp_path):
    train_section = {"save_steps": 2, **train_section}
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = make_config(model=model, optim={"optimizer": optimizer}, train=train_section, reference=reference)
    need = disk_need(prepare(config).policy, config, done=0, total=4)
    train(config)
    assert need.model == tensor_bytes(tmp_path / "run")
    assert need.checkpoint == tensor_bytes(tmp_path / "run" / "checkpoint-2")
    assert need.due == need.kept == 2


@pytest.mark.parametrize(
    ("every", "done", "total", "steps"),
    [(2, 0, 4, [2, 4]), (2, 0, 5, [2, 4, 5]), (500, 0, 4, [4]), (3, 3, 7, [6, 7]), (3, 4, 6, [6]), (2, 5, 5, []),
     (None, 0, 5, [])],
)  # fmt: skip
def test_the_last_step_has_a_checkpoint_where_any_has(every, done, total, steps):
    assert [*save_points(every, done=done, total=total)] == steps


@pytest.fixture
def policy(make_config):
    return prepare(make_config()).policy


@pytest.mark.parametrize(
    ("limit", "done", "due", "kept"), [(None, 0, 4, 4), (1, 0, 4, 2), (None, 6, 1, 1), (1, 8, 0, 0), (9, 0, 4, 4)]
)
def test_checkpoints_that_are_there_at_a_time(limit, done, due, kept, policy, make_config):
    config = make_config(train={"save_steps": 2, "save_total_limit": limit})
    need = disk_need(policy, config, done=done, total=8)
    assert (need.due, need.kept) == (due, kept)


def test_what_does_not_fit_is_refused_and_what_fits_in_part_is_said(policy, make_config, monkeypatch, caplog):
    config = make_config(train={"save_steps": 2})
    need = disk_need(policy, config, done=0, total=8)
    free = need.most

    monkeypatch.setattr("engine.train.storage.shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with caplog.at_level("INFO"):
        check_disk(policy, config, done=0, total=8)
    assert caplog.records[-1].levelname == "INFO"
    assert "disk space: this run writes up to" in caplog.text
    free = need.once
    check_disk(policy, config, done=0, total=8)
    assert caplog.records[-1].levelname == "WARNING"
    assert "the disk fills on the way; free space" in caplog.text
    free = need.once - 1
    with pytest.raises(
        UserError, match=r"this run writes at least .* are free in train\.output_dir=.*: free space, or"
    ):
        check_disk(policy, config, done=0, total=8)


@pytest.mark.parametrize(("name", "limit"), [("checkpoint-2-stopped", None), ("checkpoint-2", 1)])
def test_a_run_that_goes_on_needs_no_room_for_what_it_has_written(
    name, limit, policy, make_config, tmp_path, monkeypatch
):
    """A checkpoint goes when the next one is there, and the model takes its place."""
    config = make_config(train={"save_steps": 2, "save_total_limit": limit})
    need = disk_need(policy, config, done=6, total=8)
    folder = tmp_path / "run" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(need.checkpoint))
    free = max(need.checkpoint, need.model)
    monkeypatch.setattr("engine.train.storage.shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    check_disk(policy, config, done=6, total=8)
    free = need.checkpoint - 1
    with pytest.raises(UserError, match="this run writes at least"):
        check_disk(policy, config, done=6, total=8)
    folder.rename(folder.with_name("checkpoint-1"))
    free = need.once - 1
    if limit is None:
        with pytest.raises(UserError, match="this run writes at least"):
            check_disk(policy, config, done=6, total=8)
