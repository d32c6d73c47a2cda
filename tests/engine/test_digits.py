"""Figures are written with the digits that mean something, everywhere by the same rule."""

from __future__ import annotations

import re

import pytest

from engine.digits import shown, shown_number, with_error
from engine.train.evaluation import evaluation_lines, format_evaluation
from engine.train.progress import log_line


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.078193, "0.07819"),
        (0.0006233, "0.0006233"),
        (0.0025, "0.002500"),
        (-9.99996, "-10.00"),
        (0.00009999996, "0.0001000"),
        (999999.0, "1.000e+06"),
        (-0.0, "0"),
        (3.446215, "3.446"),
        (-190.1234, "-190.1"),
        (23288.5, "23,288"),
        (3e-5, "3.000e-05"),
        (0.0, "0"),
        (float("inf"), "inf"),
        (None, "-"),
        (1234, "1,234"),
        (True, "True"),
    ],
)
def test_four_digits_mean_something(value, words):
    assert shown_number(value) == words


def test_counts_are_whole():
    assert (shown("num_pairs", 256.0), shown("count/chosen", 3.0), shown("loss", 3.0)) == ("256", "3", "3.000")


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-6.4492, 0.2532, "-6.45 ± 0.25"),
        (1234.56, 78.9, "1,235 ± 79"),
        (0.5, 0.00021, "0.50000 ± 0.00021"),
        (-0.0006, 0.0996, "0.00 ± 0.10"),
        (0.5, 3e-9, "0.5000 ± 3.0e-09"),
        (0.5, 0.0, "0.5000"),
        (0.5, None, "0.5000"),
        (None, 0.1, "-"),
    ],
)
def test_an_error_says_how_many_digits_a_value_has(value, error, words):
    assert with_error("x", value, error) == words.replace("± ", "±\u00a0")


@pytest.mark.parametrize("value", [0.0006233, 0.0025, 1.2e-7, 0.69314718, 12.5])
def test_lines_and_tables_follow_one_rule(value):
    metrics = dict.fromkeys(("loss", "rewards/accuracies", "rewards/margins", "kl"), value)
    row = metrics | dict.fromkeys(("aux_loss", "grad_norm", "learning_rate"), value)
    speeds = {"epoch": 1.0, **{f"perf/{name}_per_second": 1.0 for name in ("pairs", "tokens")}}
    row |= {"step": 1, "perf/mfu": 0.5, "perf/peak_memory_gib": 1.0, **speeds}
    evaluated = {f"eval_{name}": value for name in metrics}
    texts = [log_line(row, total_steps=1, seconds_left=0), *evaluation_lines({"step": 1, **evaluated})]
    for text in (*texts, format_evaluation(evaluated)):
        names = r"(?:loss|aux|accuracy|margin|kl|grad norm|lr|rewards/\w+)"
        found = re.findall(rf"\b{names} +([-+.,e\d]+)", text)
        assert len(found) >= 4
        assert set(found) == {shown_number(value)}


def test_a_standard_error_is_beside_its_figure():
    values = {"eval_loss": 0.693194, "eval_loss_se": 0.0012, "eval_rewards/accuracies": 0.5, "eval_num_pairs": 4.0}
    (line,) = evaluation_lines({"step": 4, **values})
    assert line == "step 4  eval loss 0.6932 ± 0.0012  accuracy 0.5000"
    figures = format_evaluation(values).splitlines()
    assert [line.split(maxsplit=1) for line in figures] == [
        ["loss", "0.6932 ± 0.0012"],
        ["rewards/accuracies", "0.5000"],
        ["num_pairs", "4"],
    ]
    assert len({len(line.partition(" ±")[0]) for line in figures}) == 1
