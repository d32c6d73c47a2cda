"""The page as a reader and a browser see it."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from engine.errors import UserError
from engine.report import write_report

CONFIG = """
model: {model_name_or_path: 'models/<script>alert(1)</script>', dtype: bfloat16, lora: {r: 8}}
data: {dataset_name: 'a & b.jsonl', max_length: 512}
loss: {loss_type: sigmoid, beta: 0.1}
optim: {learning_rate: 1.0e-6, warmup_steps: 0}
train: {report_to: [tensorboard], seed: 42}
"""
DATA = {
    "lengths": {"prompt": [10, 20, 30], "chosen": [5, 6, 7], "rejected": [5, 5, 5]},
    "lint": {
        "source": "<b>pairs</b>.jsonl",
        "total": 5,
        "kept": 3,
        "dropped": 2,
        "counts": {"differing_prompts": 2, "<i>odd</i>": 1},
        "rows": {"differing_prompts": [0, 4], "<i>odd</i>": [3]},
    },
}


# One picture is enough where the page is looked at.
BRIEF = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]


class Page(HTMLParser):
    """Tags with their attributes, and the text of table rows."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data.strip()

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].startswith(name))


def test_page_and_pictures(make_run, rows):
    folder = make_run(rows(60, eval_every=20), config=CONFIG, data=DATA, evaluation={"rewards/accuracies": 0.875})
    path = write_report(folder)
    assert path == folder / "report" / "index.html"
    page = Page(path)
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 8
    for picture in pictures:
        kind, data = picture["src"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (int(picture["width"]), int(picture["height"]))
            assert image.width > 800
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
        assert picture["alt"]
    assert "tokens trained on, the prompt counted with each response" in path.read_text()
    assert page.row("rewards/accuracies")[-1] == "0.8750"
    assert page.row("loss")[1:3] == [f"{v['eval_loss']:.4f}" for v in rows(60, eval_every=20) if "eval_loss" in v][:3:2]


def test_page_needs_no_network(make_run):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", write_report(make_run(BRIEF, config=CONFIG)).read_text())
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link", text)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:image/png;"] * text.count("<img")


@pytest.mark.parametrize(("loss", "compared"), [("sigmoid", True), ("simpo", False), ("[orpo, sft]", False)])
def test_head_and_captions_are_those_of_the_loss(loss, compared, make_run, rows):
    config = CONFIG.replace("loss_type: sigmoid, beta: 0.1", f"loss_type: {loss}, beta: 2.5")
    text = write_report(make_run(rows(60), config=config)).read_text()
    name = loss.strip("[]").replace(", ", " + ")
    assert f"loss {name}, beta 2.5, learning rate 1e-06, step 60 in 0:02:3" in text
    assert ("than in the reference" in text, "this loss has no reference" in text) == (compared, not compared)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_rows_that_are_each_desirable_or_not_are_no_pairs(loss, make_run, rows):
    """Words, pictures and numbers; of a run that logs a divergence it is drawn."""
    logged = rows(20, eval_every=10)
    for row in logged:
        prefix = "eval_" if "eval_loss" in row else ""
        row |= {f"{prefix}count/chosen": 3.0} | ({f"{prefix}kl": 0.1} if loss == "kto" else {})
    evaluation = {"eval_loss": 0.5, "eval_count/chosen": 1234.0, "eval_num_pairs": 6.0, "eval_num_pairs/33-64": 6.0}
    config = CONFIG.replace("loss_type: sigmoid", f"loss_type: {loss}")
    path = write_report(make_run(logged, config=config, evaluation=evaluation))
    page, text = Page(path), re.sub(r"base64,[A-Za-z0-9+/=]+|<tr>.*|<wbr>", "", path.read_text())
    assert "pair" not in text.replace(loss, "").replace("num_pairs", "")
    assert "desirable and undesirable rows" in text
    assert page.row("count/chosen")[-1] == "1,234"
    assert (path.parent / "divergence.png").exists() == (loss == "kto")


def test_everything_is_escaped(make_run):
    page = Page(write_report(make_run(BRIEF, config=CONFIG, data=DATA)))
    assert not [tag for tag, _ in page.tags if tag in ("script", "i")]
    assert page.row("model.model_name_or_path")[1] == "models/<script>alert(1)</script>"
    assert page.row("data.dataset_name")[1] == "a & b.jsonl"
    assert page.row("<i>odd</i>")[1:] == ["1", "3"]


def test_only_differences_from_the_defaults_are_marked(make_run):
    page = Page(write_report(make_run(BRIEF, config=CONFIG)))
    changed = sum(attrs.get("class") == "changed" for tag, attrs in page.tags if tag == "tr")
    assert changed == 4
    assert page.row("data.max_length") == ["data.max_length", "512", "1024"]
    assert page.row("model.lora.r")[1] == "8"
    assert page.row("loss.beta") == ["loss.beta", "0.1"]


def test_data_problems_are_explained(make_run):
    page = Page(write_report(make_run(BRIEF, data=DATA)))
    assert page.row("differing_prompts: the two sides answer different prompts (dropped)")[1:] == ["2", "0, 4"]
    assert page.row("<b>pairs</b>.jsonl - kept")[1] == "3"


@pytest.mark.parametrize("lint", [{"train": DATA["lint"], "eval": {"total": 7}}, DATA["lint"] | {"eval": {"total": 7}}])
def test_reports_of_two_splits(make_run, lint):
    page = Page(write_report(make_run(BRIEF, data={"lint": lint})))
    assert page.row("eval - total")[1] == "7"
    assert page.row("train: <b>pairs</b>.jsonl - total")[1] == "5"


def test_accuracies_by_length_have_their_own_table(make_run):
    evaluation = {"eval_loss": 0.5, "eval_accuracies_by_length/33-64": 0.75, "eval_num_pairs/33-64": 8.0}
    page = Page(write_report(make_run(BRIEF, evaluation=evaluation)))
    assert page.row("33-64") == ["33-64", "0.7500", "8"]
    assert page.row("loss")[1:] == ["0.5000"]


def test_rankings_calibration_and_the_worst_rows(make_run):
    details = {
        "eval_safety": {
            "by_reference_margin": [{"from": None, "to": -50.0, "pairs": 3.0, "ranked_right": 1.0, "flipped": 1.0}],
            "calibration": [{"from": 0.5, "to": 0.55, "pairs": 3.0, "confidence": 0.52, "accuracy": 2 / 3}],
            "most_displaced": [
                {"row": 8, "chosen": None, "rejected": -40.0, "prompt": "What?", "chosen_response": "Impossible"},
                {"row": 7, "chosen": -31.25, "rejected": -40.0, "prompt": "Why?", "chosen_response": "<b>So</b>"},
            ],
        }
    }
    path = write_report(make_run(BRIEF, details=details))
    text, page = path.read_text(), Page(path)
    assert "displacement: safety" in text
    assert page.row("below -50") == ["below -50", "3", "1", "1"]
    assert page.row("0.5 to 0.55") == ["0.5 to 0.55", "3", "0.5200", "0.6667"]
    assert "row 7: -31.25 nats" in text
    assert "row 8: -inf nats" in text
    assert "&lt;b&gt;So&lt;/b&gt;" in text


def test_answers_to_rows_of_one_number_stay_apart(make_run, rows):
    """Of two sets of a mixture."""
    run = make_run(rows(2))
    samples = [
        {"step": s, "row": 3, "prompt": f"Prompt {p}?", "greedy": f"{p} at {s}", "sampled": ""}
        for s in (0, 2)
        for p in "AB"
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    text = write_report(run).read_text()
    places = [text.index(words) for words in ("Prompt A?", "A at 0", "A at 2", "Prompt B?", "B at 0", "B at 2")]
    assert places == sorted(places)


def test_progress_and_size_come_from_the_plan(make_run):
    plan = {"total_steps": 1234, "groups": 98765}
    text = write_report(make_run(BRIEF, data={**DATA, "plan": plan})).read_text()
    assert "step 2 of 1,234" in text
    assert "98,765" in text


def test_metrics_alone_are_enough(make_run):
    text = write_report(make_run(BRIEF)).read_text()
    assert "has not been evaluated" in text
    assert "no record of its data" in text
    assert "no config.yaml" in text
    assert "in progress or stopped" in text


def test_a_second_report_replaces_the_first(make_run):
    folder = make_run(BRIEF, data=DATA)
    assert (write_report(folder).parent / "lengths.png").is_file()
    (folder / "data.json").unlink()
    assert not (write_report(folder).parent / "lengths.png").exists()


def test_bad_folders(tmp_path, make_run):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "nowhere")
    folder = make_run(BRIEF)
    (folder / "report").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(folder)


def test_a_full_disk_keeps_the_earlier_report_whole(make_run, monkeypatch):
    folder = make_run(BRIEF, data=DATA)
    report = write_report(folder).parent
    before = {p.name: p.read_bytes() for p in report.iterdir()}
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.2}\n{"step": 2, "loss": 0.1}\n')

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write the report .*: no space left on the disk; free space or move"):
        write_report(folder)
    assert {p.name: p.read_bytes() for p in report.iterdir()} == before
