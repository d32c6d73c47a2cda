"""Whatever a key holds, a file is converted or refused in one line, and nothing else is raised."""

from __future__ import annotations

import pytest

from engine.config.convert.convert import TRAINERS, recognise
from engine.config.convert.reading import convert_with
from engine.config.convert.transformers_keys import TRL_KEYS
from engine.config.from_trl import convert_keys
from engine.config.trl_file import TrlFile
from engine.errors import UserError

VALUES = ("word", 0, -3, 2.5, True, False, [], ["a", 1], [[1]], {}, {"a": 1}, {"path": {}}, "", "1e-6", [{"path": "d"}])
VALID = {
    "TRL": {"model_name_or_path": "m", "dataset_name": "d"},
    "Axolotl": {"base_model": "m", "rl": "dpo", "learning_rate": 1e-5, "datasets": [{"path": "d"}]},
    "LLaMA-Factory": {"model_name_or_path": "m", "stage": "dpo", "dataset": "d", "dataset_dir": "ONLINE"},
    "ms-swift": {"model": "m", "rlhf_type": "dpo", "dataset": "d"},
    "alignment-handbook": {"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "dataset_splits": ["train"]},
    "open-instruct": {"model_name_or_path": "m", "mixer_list": ["d", 1.0], "max_seq_length": 2048},
}


def refusal(name: str, keys: dict) -> str | None:
    """Why keys are not converted; None where they are; the converter asks the schema itself."""
    try:
        conversion = converted(name, keys)
    except UserError as error:
        return str(error)
    assert conversion.values
    return None


def converted(name: str, keys: dict):
    trainer = next((one for one in TRAINERS if one.name == name), None)
    file = TrlFile("file.yaml", dict(keys))
    return convert_keys(file) if trainer is None else convert_with(trainer, file, None)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", VALID)
def test_any_value_of_any_key_is_read_or_refused(name, stride):
    """Of each key a few of the values, others from key to key; all of them in the long form."""
    trainer = next((one for one in TRAINERS if one.name == name), None)
    assert recognise("file.yaml", VALID[name]) is trainer
    known = sorted(TRL_KEYS) if trainer is None else [*trainer.rules, *sorted(trainer.same_names)]
    refused = [
        refusal(name, {**VALID[name], key: value})
        for place, key in enumerate([*known, "of_nobody"])
        for value in VALUES[place % stride :: stride]
    ]
    assert sum(text is not None for text in refused) > 10
    assert not any("\n" in (text or "") for text in refused)


@pytest.mark.parametrize("name", VALID)
def test_every_key_is_converted_or_said(name):
    """No key of any trainer goes without a word or a value."""
    trainer = next((one for one in TRAINERS if one.name == name), None)
    known = sorted(TRL_KEYS) if trainer is None else [*trainer.rules, *sorted(trainer.same_names)]
    silent = converted(name, VALID[name])
    before = {(note.key, note.text) for note in silent.notes}, silent.values
    for key in [*known, "of_nobody"]:
        if key in VALID[name]:
            continue
        assert any(_said(name, key, value, before) for value in ("word", 1, True, 0.25, ["word"], {"a": 1})), (
            f"{key} goes without a word"
        )


def _said(name: str, key: str, value, before: tuple) -> bool:
    """Whether a value of a key is refused by name, changes what is converted, or has a note."""
    try:
        found = converted(name, {**VALID[name], key: value})
    except UserError as error:
        return key in str(error) or "did you mean" in str(error)
    notes = {(note.key, note.text) for note in found.notes}
    said = any(note.key.partition(".")[0] == key for note in found.notes)
    return said or bool(notes - before[0]) or found.values != before[1]
