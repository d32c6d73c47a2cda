"""The demo replaces its own files and nothing else."""

from __future__ import annotations

import pytest

from engine.demo.workspace import MARKER, prepare_workspace
from engine.errors import UserError


def test_new_and_empty_folders_are_taken(tmp_path):
    workspace = prepare_workspace(tmp_path / "a" / "b")
    assert (workspace.folder / MARKER).is_file()
    assert workspace.train_data.parent.is_dir()
    (tmp_path / "empty").mkdir()
    prepare_workspace(tmp_path / "empty")


def test_what_an_earlier_demo_wrote_is_replaced(tmp_path):
    first = prepare_workspace(tmp_path / "demo")
    first.run.mkdir()
    (first.run / "metrics.jsonl").touch()
    first.config.touch()
    (first.folder / "notes.txt").write_text("mine")
    (first.folder / "run-2").mkdir()
    second = prepare_workspace(tmp_path / "demo")
    assert not second.run.exists()
    assert not second.config.exists()
    assert (second.folder / "notes.txt").read_text() == "mine"
    assert (second.folder / "run-2").is_dir()


def test_a_link_is_removed_and_what_it_points_to_is_kept(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("precious")
    workspace = prepare_workspace(tmp_path / "demo")
    workspace.run.symlink_to(elsewhere)
    prepare_workspace(tmp_path / "demo")
    assert not workspace.run.is_symlink()
    assert (elsewhere / "weights").read_text() == "precious"


def test_other_folders_and_files_are_refused(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "run").mkdir()
    with pytest.raises(UserError, match="did not write"):
        prepare_workspace(tmp_path / "work")
    assert (tmp_path / "work" / "run").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a folder"):
        prepare_workspace(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write to"):
        prepare_workspace(tmp_path / "file" / "demo")
