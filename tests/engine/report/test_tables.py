"""Every metric has its words."""

from __future__ import annotations

import re
from pathlib import Path

from engine.report import write_report
from engine.report.figures import PICTURES, throughput
from engine.report.records import read_run
from engine.report.tables import metric_rows
from engine.report.words import glossary, words_of
from engine.run_folder import BY_LENGTH, SAMPLED
from engine.train.metrics import PREFERENCE_NAMES, TOKEN_NAMES


def test_rows_of_sets_have_words_and_errors_beside_their_values():
    found = metric_rows(
        [
            {
                "eval_safety_rewards/accuracies": 0.75,
                "eval_safety_logps_change/chosen": -2.0,
                "eval_safety_logps_change/chosen_se": 0.5,
                "eval_as_trained/loss": 0.25,
                "eval_odd": 1.0,
            }
        ],
        "pairs",
    )
    assert [(row["name"], row["values"]) for row in found] == [
        ("safety_rewards/accuracies", ["0.7500"]),
        ("safety_logps_change/chosen", ["-2.00 ±\u00a00.50"]),
        ("as_trained/loss", ["0.2500"]),
        ("odd", ["1.000"]),
    ]
    assert found[0]["words"] == "share of pairs whose rewards are in the right order"
    assert found[2]["words"].startswith("before rounding: ")
    assert found[3]["words"] == ""


def test_every_metric_of_an_evaluation_has_words():
    lines = Path(__file__).parents[3].joinpath("docs", "evaluation.md").read_text().splitlines()
    defined = [line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")]
    assert f"{SAMPLED}kl" in defined
    for name in (*PREFERENCE_NAMES, *TOKEN_NAMES, "num_pairs", "aux_loss", *defined):
        assert words_of(name, "pairs"), name


def test_abbreviations_are_explained_in_the_page_itself(make_run, rows):
    logged = [row | {"perf/mfu": 0.4} for row in rows(3)]
    folder = make_run(logged, data={"plan": {"groups": 12}}, evaluation={"eval_loss": 0.5, BY_LENGTH + "1-32": 0.5})
    page = write_report(folder).read_text()
    explained = page[page.index("<dl>") : page.index("</dl>")]
    labels = [axes.get_ylabel() for axes in throughput(read_run(folder)).axes]
    shown = " ".join([*labels, *(picture.caption for picture in PICTURES)])
    found = set(re.findall(r"\b[A-Z]{2,}\b", shown))
    assert "MFU" in found
    assert [word for word in found if f"<dt>{word}</dt>" not in explained] == []
    assert "<dt>preference group</dt>" in explained
    assert "preference groups: prompts with" in page
    assert "whose longest response has so many tokens" in page


def test_terms_are_those_of_the_loss():
    assert "reference" in dict(glossary("pairs", has_reference=True))
    assert "reference" not in str(glossary("rows", has_reference=False))
