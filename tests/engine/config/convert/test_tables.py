"""The page of converters is that of the converters' own tables, and the tables know what they claim to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from engine.config.convert.convert import TRAINERS
from engine.config.convert.rules import To
from engine.config.convert.tables import rewritten
from engine.config.convert.transformers_keys import TRANSFORMERS_DEFAULTS, TRANSFORMERS_KEYS, TRL_ALONE, TRL_KEYS
from engine.config.trl_keys import CONVERTED

PAGE = Path(__file__).parents[4] / "docs" / "converters.md"


def test_the_page_shows_the_tables_of_the_converters():
    page = PAGE.read_text(encoding="utf-8")
    assert page == rewritten(page), "write it anew: python -m engine.config.convert.tables"


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
def test_keys_are_handed_on_to_keys_that_there_are(trainer):
    handed = {rule.key for rule in trainer.rules.values() if isinstance(rule, To)}
    assert handed | trainer.same_names | set(trainer.defaults) <= TRL_KEYS
    assert not trainer.same_names & set(trainer.rules)
    assert trainer.marks <= set(trainer.rules) | trainer.same_names
    assert set(trainer.defaults) <= CONVERTED


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
def test_no_mark_is_a_key_of_another(trainer):
    for other in TRAINERS:
        if other is not trainer:
            assert not trainer.marks & (set(other.rules) | other.same_names)
    assert not trainer.marks & TRL_KEYS


def test_the_keys_of_transformers_are_its_own():
    transformers = pytest.importorskip("transformers")
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert fields <= TRANSFORMERS_KEYS
    assert not fields & TRL_ALONE
    defaults = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    # None is off
    assert {key: defaults[key] or False for key in TRANSFORMERS_DEFAULTS} == TRANSFORMERS_DEFAULTS
