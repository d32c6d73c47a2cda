from __future__ import annotations

import pytest

from engine import cli
from engine.errors import SeveralErrors, UserError, raise_all

MISSING = {
    "model.model_name_or_path": "./no_model",
    "reference.model_name_or_path": "./no_reference",
    "data.dataset_name": "./no_rows.jsonl",
    "data.eval_dataset_name": "./no_held_out.jsonl",
}
NEEDED = {
    "train": tuple(MISSING),
    "precompute": tuple(MISSING),
    "evaluate": ("model.model_name_or_path", "reference.model_name_or_path", "data.eval_dataset_name"),
    "check": ("model.model_name_or_path", "data.dataset_name", "data.eval_dataset_name"),
    "plan": ("model.model_name_or_path", "data.dataset_name"),
}


@pytest.mark.parametrize("command", NEEDED)
def test_whatever_a_command_needs_and_is_missing_has_a_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {model_name_or_path: m}\ndata: {dataset_name: d}\n")
    options = [word for key, value in MISSING.items() for word in (f"--{key}", value)]
    assert cli.main([command, "run.yaml", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert [line.split("=")[0] for line in lines] == [f"error: {key}" for key in NEEDED[command]]
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def _refuse(words: str):
    def check():
        raise UserError(words)

    return check


def test_checks_are_all_made_and_what_fails_is_raised_at_once():
    raise_all([lambda: None])
    with pytest.raises(UserError, match=r"^a$") as alone:
        raise_all([_refuse("a"), lambda: None])
    assert not isinstance(alone.value, SeveralErrors)
    with pytest.raises(SeveralErrors, match=r"^a; b; c$"):
        raise_all([lambda: raise_all([_refuse("a"), _refuse("b")]), _refuse("c")])
