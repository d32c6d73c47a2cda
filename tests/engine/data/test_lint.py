"""The report: totals, rows by problem, the table for people, strictness."""

from __future__ import annotations

import json

import pytest

from engine.data.lint import LintReport
from engine.data.problems import PROBLEMS
from engine.errors import UserError


@pytest.fixture
def report():
    report = LintReport("pairs.jsonl")
    report.layout = "preference"
    for row in range(1200):
        report.add_row()
        if row % 100 == 7:
            report.add("truncated", row)
    report.add("prompt_too_long", 3)
    report.add("duplicate", 4)
    return report


def test_totals_and_rows(report):
    assert (report.total, report.kept, report.dropped) == (1200, 1199, 1)
    assert report.counts == {"prompt_too_long": 1, "truncated": 12, "duplicate": 1}
    assert report.rows("truncated")[:3] == [7, 107, 207]
    assert report.rows("double_bos") == []


def test_table(report):
    lines = report.format().splitlines()
    assert lines[0] == "pairs.jsonl: 1,200 preference rows, 1,199 kept, 1 dropped (rows are numbered from 0)"
    assert lines[1] == "  prompt_too_long   1  dropped  row 3"
    assert lines[3] == "  truncated        12  kept     rows 7, 107, 207, 307, 407, ..."
    assert "raise data.max_length" in lines[4]
    assert lines[5] == "  duplicate         1  kept     row 4"
    assert all(line.isascii() for line in lines)


def test_table_without_problems():
    report = LintReport("a.json")
    report.add_row()
    assert report.format() == "a.json: 1 rows, 1 kept, 0 dropped, no problems"


def test_dict_is_json_and_bounded():
    report = LintReport("a.json")
    for row in range(500):
        report.add_row()
        report.add("truncated", row)
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["counts"] == {"truncated": 500}
    assert saved["rows"]["truncated"] == list(range(100))
    assert (saved["source"], saved["total"], saved["kept"], saved["dropped"]) == ("a.json", 500, 500, 0)


def test_strict_names_problem_count_and_rows(report):
    report.raise_if_strict(False)
    with pytest.raises(UserError, match=r"pairs\.jsonl: prompt_too_long in 1 of 1,200 rows \(row 3\): the prompt"):
        report.raise_if_strict(True)
    LintReport("clean").raise_if_strict(True)


def test_nothing_left_is_an_error():
    report = LintReport("a.json")
    with pytest.raises(UserError, match=r"a\.json: the split has no rows"):
        report.raise_if_empty()
    for row in range(3):
        report.add_row()
        report.add("prompt_too_long", row)
    with pytest.raises(UserError, match=r"none of 3 rows can be used \(prompt_too_long 3\); raise data\.max_length"):
        report.raise_if_empty()
    report.add_row()
    report.raise_if_empty()


def test_unknown_problem_is_a_programming_error():
    with pytest.raises(KeyError):
        LintReport("a").add("typo", 0)
    assert {problem.name for problem in PROBLEMS.values() if problem.drops} == {
        "differing_prompts",
        "no_scored_pair",
        "tied_ranking",
        "prompt_too_long",
        "no_prompt_tokens",
        "no_completion_tokens",
        "nothing_counts",
    }


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_said_of_a_problem_is_short(name):
    problem = PROBLEMS[name]
    assert len(f"{problem.meaning}; {problem.advice}") <= 180
