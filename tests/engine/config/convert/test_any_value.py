"""Whatever a key holds, a file is converted or refused in one line, and nothing else is raised."""

from __future__ import annotations

import pytest

from engine.config.convert.convert import TRAINERS, recognise
from engine.config.convert.reading import convert_with
from engine.config.convert.transformers_keys import TRL_KEYS
from engine.config.from_trl import convert_keys
from engine.config.load import build_config
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
    """Why keys are not converted; None where they are, to what the schema takes."""
    try:
        conversion = converted(name, keys)
    except UserError as error:
        return str(error)
    sections = {part: dict(values) for part, values in conversion.values.items()}
    sections.setdefault("model", {}).setdefault("model_name_or_path", "m")
    if not sections.setdefault("data", {}).get("datasets"):
        sections["data"].setdefault("dataset_name", "d")
    build_config(sections, "file.yaml")
    return None


def converted(name: str, keys: dict):
    trainer = next((one for one in TRAINERS if one.name == name), None)
    file = TrlFile("file.yaml", dict(keys))
    return convert_keys(file) if trainer is None else convert_with(trainer, file, None)


@pytest.mark.parametrize("name", VALID)
def test_any_value_of_any_key_is_read_or_refused(name):
    trainer = next((one for one in TRAINERS if one.name == name), None)
    assert recognise("file.yaml", VALID[name]) is trainer
    known = sorted(TRL_KEYS) if trainer is None else [*trainer.rules, *sorted(trainer.same_names)]
    refused = [refusal(name, {**VALID[name], key: value}) for key in [*known, "of_nobody"] for value in VALUES]
    assert sum(text is not None for text in refused) > 50
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
        answers = []
        for value in (1, 0.25, "word", True, ["word"], {"a": 1}):
            try:
                found = converted(name, {**VALID[name], key: value})
            except UserError as error:
                answers.append(key in str(error) or "did you mean" in str(error))
                continue
            new = {(note.key, note.text) for note in found.notes} - before[0]
            said = any(note.key.partition(".")[0] == key for note in found.notes)
            answers.append(said or bool(new) or found.values != before[1])
        assert any(answers), f"{key} goes without a word"
