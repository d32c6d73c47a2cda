"""Every kind of page in a real browser, on a phone and a desktop, in light and in dark."""

from __future__ import annotations

import json
from itertools import product

import pytest

from engine.report import style, write_comparison, write_report
from tests.engine.report.browser import complaints, open_browser, show
from tests.engine.report.conftest import metric_rows

CONFIG = """
model: {model_name_or_path: /home/somebody/models/a-model-with-a-long-name-7b-instruct, lora: {r: 8}}
data: {dataset_name: /data/preferences/of/somebody/train.jsonl, max_length: 512}
loss: {loss_type: sigmoid, beta: 0.1}
train: {output_dir: %s}
"""
TEXTS = {
    "prompt": "<|user|>What is " + "a-word-without-any-end" * 9 + "?<|assistant|>",
    "chosen_response": "It is <b>nothing</b>. " * 20,
    "rejected_response": "x" * 300,
}
FIGURES = {
    "loss": 0.5,
    "rewards/accuracies": 0.75,
    "rewards/accuracies_chosen_longer": 0.625,
    "reference_ranking_accuracy_per_token": 0.5,
    "logps_change/chosen": -12.34567,
    "logps_change/chosen_se": 1.2,
    "sampled/kl": 3.21,
    "sampled/kl_se": 0.4,
    "num_pairs": 1234.0,
    "accuracies_by_length/33-64": 0.75,
    "num_pairs/33-64": 1234.0,
}
DETAILS = {
    "by_reference_margin": [
        {"from": None, "to": -50.0, "pairs": 3.0, "ranked_right": 1.0, "flipped": 1.0},
        {"from": 0.0, "to": 5.0, "pairs": 300.0, "ranked_right": 200.0, "flipped": 100.0},
    ],
    "calibration": [{"from": 0.5, "to": 0.55, "pairs": 3.0, "confidence": 0.52, "accuracy": 2 / 3}],
    "most_displaced": [{"row": "7 of a set", "chosen": -31.25, "rejected": -40.0, **TEXTS}],
}
DATA = {
    "lengths": {"prompt": [10, 20, 30], "chosen": [5, 6, 7], "rejected": [5, 5, 5]},
    "lint": {
        "source": "/data/preferences/of/somebody/train.jsonl",
        "total": 5,
        "kept": 3,
        "dropped": 2,
        "counts": {"differing_prompts": 2},
        "rows": {"differing_prompts": [0, 4]},
    },
}
SETS = ("ultrafeedback_binarized_cleaned", "hh")


def full_rows():
    """With everything that some run logs."""
    rows = metric_rows(60, eval_every=20)
    for row in rows:
        held_out = "eval_loss" in row
        for name in SETS:
            prefix = f"eval/{name}/" if held_out else f"train/{name}/"
            row |= {f"{prefix}{key}": 0.5 for key in ("num_pairs", "loss", "rewards/accuracies", "rewards/margins")}
        if held_out:
            row |= {"eval_kl": 0.5, "eval_logps_change/chosen": -row["step"] / 9}
        else:
            experts = {f"experts/layer_{n}/{side}": 0.2 for n in range(3) for side in ("busiest", "idlest")}
            row |= {"kl": 0.4, "aux_loss": 1.1, "experts/busiest": 0.3, "experts/idlest": 0.1, **experts}
    return rows


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Every kind of page: of a full run, of one that has only begun, of two runs and of many."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, rows, *, full):
        folder = root / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if full:
            (folder / "config.yaml").write_text(CONFIG % folder)
            evaluation = {f"eval_safety_{key}": value for key, value in FIGURES.items()}
            evaluation |= {f"eval_{key}": value for key, value in FIGURES.items()}
            samples = [
                {"step": s, "row": row, "prompt": TEXTS["prompt"] + row, "greedy": "y" * 200, "sampled": "no " * 50}
                for s in (0, 20, 60)
                for row in ("0", "1 of a set")
            ]
            (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
            for file, content in (("data", DATA), ("evaluation", evaluation)):
                (folder / f"{file}.json").write_text(json.dumps(content))
            (folder / "evaluation_details.json").write_text(json.dumps({"eval": DETAILS, "eval_safety": DETAILS}))
        return folder

    values = list(product((0.05, 0.1), ("sigmoid", "ipo"), ("0.000001", "0.0001")))
    names = [f"beta={beta},loss_type={loss},learning_rate={rate}" for beta, loss, rate in values]
    many = [run(name, metric_rows(8, eval_every=4), full=False) for name in names]
    full = [run(name, full_rows(), full=True) for name in ("first-run-of-somebody", "second")]
    begun = run("begun", [{"step": 1, "loss": 0.7}], full=False)
    with pytest.MonkeyPatch.context() as patch:
        # A coarse picture has its place in the page as a fine one has.
        patch.setattr(style, "DPI", 40)
        return {
            "full": write_report(full[0]),
            "begun": write_report(begun),
            "two": write_comparison(full, root / "two.html"),
            "sweep": write_comparison(many),
        }


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("kind", ["full", "begun", "two", "sweep"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)], ids=["phone", "desktop"])
def test_a_page_can_be_read(kind, dark, width, height, browser, pages):
    show(browser, pages[kind], width=width, height=height, dark=dark)
    assert complaints(browser, pages[kind]) == []


BAD = """<!doctype html><html lang="en"><head><title>bad</title>
<meta name="viewport" content="width=device-width, initial-scale=1"></head><body><h1>Bad</h1>%s</body></html>"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("<div style='width: 900px'>wide</div>", "the page is 9"),
        ("<img src='data:image/png;base64,'>", "without an alternative text"),
        ("<img alt='a picture of nothing' src='data:image/png;base64,'>", "a picture that is not drawn"),
        ("<p style='color: #888'>grey</p>", "contrast 3.5"),
        ("<h3>deep</h3>", "a heading of level 3 below one of level 1"),
        ("<table><thead><tr><th>a</th></tr></thead></table>", "a table outside a box"),
        ("<button>x</button>", "too few for a finger"),
        ("<p style='font-size: 9px'>small</p>", "text of 9 pixels"),
        ("<p style='width: 20px; overflow-wrap: anywhere'>responses</p>", "is broken over"),
        ("<script>console.warn('careful')</script>", "WARNING"),
        ("<script>nothing()</script>", "nothing is not defined"),
        ("<link rel='stylesheet' href='http://example.com/a.css'>", "asked for http://example.com/a.css"),
        ("<img alt='a picture of another file' src='other.png'>", "asked for file:"),
    ],
)
def test_what_cannot_be_read_is_seen(body, words, browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(BAD % body)
    show(browser, page, width=390, height=844, dark=False)
    assert any(words in line for line in complaints(browser, page))
