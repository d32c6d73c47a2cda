"""A chat template that writes today's date: one day for a run, its resume, and the store."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from engine.check import check
from engine.config import load_config
from engine.config.schema import DataConfig
from engine.data.tokenize import Encoder
from engine.errors import UserError
from engine.precompute import fill_store
from engine.reference import template_date
from engine.reference.template_date import DATE_FILE, with_template_date
from engine.train.loop import train
from tests.engine.conftest import build_tokenizer, save_tiny_model

DATED = (
    "{{ strftime_now('%d %b %Y') + eos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Days:
    """A calendar whose today is given."""

    fromisoformat = staticmethod(date.fromisoformat)

    def __init__(self, today: str):
        self._today = date.fromisoformat(today)

    def today(self) -> date:
        return self._today


@pytest.fixture
def on_day(monkeypatch):
    return lambda day: monkeypatch.setattr(template_date, "date", Days(day))


@pytest.fixture
def config_file(tmp_path):
    save_tiny_model(tmp_path / "model", build_tokenizer(chat_template=DATED))
    row = '{"prompt": [{"role": "user", "content": "q %d"}], "chosen": "a %d", "rejected": "b"}\n'
    (tmp_path / "rows.jsonl").write_text("".join(row % (i, i) for i in range(4)))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{model_name_or_path: {tmp_path}/model, dtype: float32}}\n"
        f"data: {{dataset_name: {tmp_path}/rows.jsonl, format: conversation}}\n"
        "packing: {pairs_per_step: 2, tokens_per_pack: 256}\n"
        f"reference: {{store: {tmp_path}/store}}\n"
        f"train: {{output_dir: {tmp_path}/run, max_steps: 2, save_steps: 1, report_to: []}}\n"
    )
    return path


def test_a_run_goes_on_another_day_with_its_own_date(config_file, tmp_path, on_day, caplog):
    on_day("2026-11-26")
    caplog.set_level("INFO")
    train(load_config(config_file, ["--reference.mode", "live"]))
    assert "the chat template writes today's date: pinned to 2026-11-26" in caplog.text
    assert load_config(tmp_path / "run" / "config.yaml").data.template_date == "2026-11-26"
    on_day("2026-12-31")
    more = load_config(config_file, ["--reference.mode", "live", "--train.max_steps", "3"])
    assert train(more, resume=True).resumed_from == 2


def test_stored_references_are_found_another_day(config_file, tmp_path, on_day):
    on_day("2026-11-26")
    fill_store(load_config(config_file))
    on_day("2026-11-27")
    train(load_config(config_file, ["--reference.mode", "stored"]))
    assert load_config(tmp_path / "run" / "config.yaml").data.template_date == "2026-11-26"
    other = with_template_date(load_config(config_file, ["--data.template_date", "2027-01-01"]), tokenizer_of(tmp_path))
    assert other.data.template_date == "2027-01-01"
    (tmp_path / "store" / DATE_FILE).write_text("{}")
    with pytest.raises(UserError, match=rf"{DATE_FILE} holds no date"):
        with_template_date(load_config(config_file), tokenizer_of(tmp_path))


def test_check_shows_the_day_that_training_would_use(config_file, tmp_path, on_day):
    on_day("2026-12-31")
    assert "pinned to 2026-12-31 (data.template_date)" in check(load_config(config_file)).text
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / DATE_FILE).write_text('{"date": "2026-11-26"}')
    text = check(load_config(config_file)).text
    assert "pinned to 2026-11-26" in text
    assert "'26 Nov 2026" in text


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def test_the_date_is_what_the_model_reads(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=DATED)
    encoder = Encoder(tokenizer, DataConfig(dataset_name="x", template_date="2026-11-26"))
    assert encoder.render([{"role": "user", "content": "q"}]).startswith("26 Nov 2026</s>")
    with pytest.raises(ValueError, match=r"data\.template_date must be a day such as 2026-11-26, got 26 Nov"):
        DataConfig(dataset_name="x", template_date="26 Nov")


def test_other_templates_have_no_date(tiny_tokenizer, config_file):
    config = load_config(config_file)
    assert with_template_date(config, tiny_tokenizer) is config
