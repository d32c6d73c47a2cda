"""What is drawn is what was logged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.report import figures
from engine.report.records import read_run
from engine.report.style import SMOOTH_FROM, smooth

LENGTHS = {"prompt": [10, 20, 30, 40], "chosen": [5, 6, 7, 300], "rejected": [5, 5, 5, 9]}


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def values_of(logged, name):
    return [row[name] for row in logged if row.get(name) is not None]


def test_few_points_are_drawn_as_logged(make_run, rows):
    logged = rows(20, eval_every=5)
    (axes,) = figures.loss(read_run(make_run(logged))).axes
    lines = lines_of(axes)
    np.testing.assert_array_equal(lines["training"].get_xdata(), range(1, 21))
    np.testing.assert_array_equal(lines["training"].get_ydata(), values_of(logged, "loss"))
    np.testing.assert_array_equal(lines["held-out"].get_ydata(), values_of(logged, "eval_loss"))
    assert axes.get_xlabel() == "optimizer step"
    assert "nats" in axes.get_ylabel()


def test_many_points_are_drawn_raw_and_smoothed(make_run, rows):
    logged = rows(3 * SMOOTH_FROM)
    (axes,) = figures.loss(read_run(make_run(logged))).axes
    lines = lines_of(axes)
    np.testing.assert_array_equal(lines["_training (raw)"].get_ydata(), values_of(logged, "loss"))
    assert np.std(np.diff(lines["training"].get_ydata())) < np.std(np.diff(values_of(logged, "loss")))


def test_moving_average():
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 1.5, 3.0, 6.5, 6.5])
    assert np.isnan(smooth(np.array([np.nan] * 7), 3)).all()


@pytest.mark.parametrize(
    ("loss_type", "shown"), [("sigmoid", True), ("robust", True), ("ipo", False), ("hinge", False)]
)
def test_ln_2_is_marked_where_it_is_the_start(make_run, rows, loss_type, shown):
    run = read_run(make_run(rows(3), config=f"loss: {{loss_type: {loss_type}}}"))
    (axes,) = figures.loss(run).axes
    heights = [line.get_ydata()[0] for line in axes.get_lines() if line.get_label().startswith("_ln 2")]
    assert heights == ([math.log(2)] if shown else [])


@pytest.mark.parametrize("family", ["rewards", "logps"])
def test_chosen_and_rejected_with_their_held_out_values(make_run, rows, family):
    logged = rows(10, eval_every=5)
    figure = getattr(figures, family)(read_run(make_run(logged)))
    lines = lines_of(figure.axes[0])
    for side in ("chosen", "rejected"):
        np.testing.assert_array_equal(lines[side].get_ydata(), values_of(logged, f"{family}/{side}"))
        np.testing.assert_array_equal(
            lines[f"{side}, held-out"].get_ydata(), values_of(logged, f"eval_{family}/{side}")
        )


def test_margins_and_accuracies(make_run, rows):
    logged = rows(10)
    run = read_run(make_run(logged))
    margins = lines_of(figures.margins(run).axes[0])["training"]
    np.testing.assert_array_equal(margins.get_ydata(), values_of(logged, "rewards/margins"))
    (axes,) = figures.accuracies(run).axes
    np.testing.assert_array_equal(lines_of(axes)["training"].get_ydata(), values_of(logged, "rewards/accuracies"))
    assert axes.get_ylim()[0] < 0.0 < 1.0 < axes.get_ylim()[1]


def test_optimizer_panels(make_run, rows):
    logged = rows(10)
    run = read_run(make_run(logged, config="optim: {max_grad_norm: 1.0, learning_rate: 1.0e-6}"))
    rate, norm = figures.optimizer(run).axes
    np.testing.assert_array_equal(lines_of(rate)["learning rate"].get_ydata(), values_of(logged, "learning_rate"))
    np.testing.assert_array_equal(lines_of(norm)["gradient norm"].get_ydata(), values_of(logged, "grad_norm"))
    assert "_clipped above 1" in lines_of(norm)
    assert norm.get_yscale() == "linear"


def test_wild_gradient_norms_get_a_log_axis(make_run):
    run = read_run(make_run([{"step": s, "grad_norm": 1000.0 if s == 2 else 1.0} for s in range(1, 8)]))
    assert figures.optimizer(run).axes[0].get_yscale() == "log"


def test_throughput_in_percent_and_without_what_was_not_measured(make_run, rows):
    logged = rows(10)
    figure = figures.throughput(read_run(make_run(logged)))
    assert [axes.get_ylabel() for axes in figure.axes] == ["tokens / s", "pairs / s", "% of tokens", "memory (GiB)"]
    speed, _, share, _ = figure.axes
    np.testing.assert_array_equal(lines_of(speed)["tokens"].get_ydata(), values_of(logged, "perf/tokens_per_second"))
    np.testing.assert_allclose(
        lines_of(share)["saved by prompt sharing"].get_ydata(),
        [100 * v for v in values_of(logged, "perf/shared_fraction")],
    )


def test_expert_load_over_steps_and_by_layer(make_run, rows):
    logged = rows(3)
    for row in logged:
        shares = {"busiest": 0.5, "idlest": 0.1, "layer_0/busiest": 0.4, "layer_0/idlest": 0.2}
        shares |= {"layer_1/busiest": 0.5, "layer_1/idlest": 0.1 * row["step"]}
        row |= {f"experts/{name}": share for name, share in shares.items()} | {"aux_loss": 1.5}
    run = read_run(make_run(logged))
    load, balance = figures.experts(run).axes
    assert {label: list(line.get_ydata()) for label, line in lines_of(load).items()} == {
        "busiest expert": [50, 50, 50],
        "idlest expert": [10, 10, 10],
    }
    assert [list(line.get_ydata()) for line in lines_of(balance).values()] == [[1.5, 1.5, 1.5]]
    (layers,) = figures.expert_layers(run).axes
    drawn = {label: list(line.get_ydata()) for label, line in lines_of(layers).items()}
    assert drawn["busiest"] == pytest.approx([40, 50])
    assert drawn["idlest"] == pytest.approx([20, 30])


def test_length_histograms_count_every_row_once(make_run, rows):
    figure = figures.lengths(read_run(make_run(rows(1), data={"lengths": LENGTHS})))
    for axes, (name, values) in zip(figure.axes, LENGTHS.items(), strict=True):
        assert sum(bar.get_height() for bar in axes.patches) == len(values)
        assert name in axes.texts[0].get_text()
        assert f"longest {max(values)}" in axes.texts[0].get_text()
    assert "longer" in figure.axes[-1].get_xlabel()


def test_a_sample_of_the_lengths_says_so(make_run, rows):
    figure = figures.lengths(read_run(make_run(rows(1), data={"lengths": LENGTHS, "rows_per_length": 20})))
    assert any("one of every 20 kept rows" in text.get_text() for text in figure.texts)


def test_a_single_row_is_in_view(make_run, rows):
    run = read_run(make_run(rows(1)))
    for picture in figures.PICTURES:
        figure = picture.draw(run)
        if figure is None:
            assert picture.name in ("lengths", "experts", "expert_layers", "sets", "divergence")
            continue
        low, high = figure.axes[0].get_xlim()
        assert low < 1 < high


def test_nothing_logged_draws_nothing(make_run):
    run = read_run(make_run([{"step": 1, "epoch": 0.1}], data={"lengths": []}))
    assert [picture.name for picture in figures.PICTURES if picture.draw(run) is not None] == []


def test_all_nan_draws_without_failing(make_run):
    run = read_run(make_run([{"step": s, "loss": math.nan, "grad_norm": math.nan} for s in (1, 2)]))
    assert figures.loss(run) is not None
    assert figures.optimizer(run) is None


def test_the_sets_of_a_mixture_are_drawn_each(make_run, rows):
    logged = rows(6)
    for step, row in enumerate(logged):
        for label in ("a", "b"):
            # A set that is no part of an interval has no means there.
            has = label == "a" or step % 2
            row[f"train/{label}/num_pairs"] = 3.0 if has else 0.0
            row |= {f"train/{label}/rewards/{name}": step / 10 for name in ("margins", "accuracies")} if has else {}
    figure = figures.sets(read_run(make_run(logged)))
    for axes in figure.axes:
        lines = lines_of(axes)
        assert {"a", "b"} <= set(lines)
        np.testing.assert_array_equal(lines["a"].get_ydata(), [step / 10 for step in range(6)])
        np.testing.assert_array_equal(lines["b"].get_xdata(), [2, 4, 6])


def test_a_run_on_one_set_has_no_picture_of_sets(make_run, rows):
    assert figures.sets(read_run(make_run(rows(3)))) is None


@pytest.mark.parametrize("eval_every", [None, 20])
def test_axes_are_named_with_evaluations_too(eval_every, make_run, rows):
    run = read_run(make_run(rows(60, eval_every=eval_every)))
    names = {figures.rewards: "reward (nats x beta)", figures.logps: "log-prob (nats per response)"}
    for draw, name in names.items():
        (axes,) = draw(run).axes
        assert axes.get_ylabel() == name


@pytest.mark.parametrize("picture", figures.PICTURES, ids=lambda picture: picture.name)
@pytest.mark.parametrize("loss_type", ["simpo", "kto"])
def test_no_words_are_cut_off(picture, loss_type, make_run, rows, check_words):
    """Headings, labels and legends of every picture lie inside it, of several evaluation sets with long names."""
    logged = rows(20, eval_every=5)
    for row in logged:
        found = {key[5:]: value for key, value in row.items() if key.startswith("eval_")}
        row |= {f"eval_{name}_{key}": value for name in ("a_long_name", "b") for key, value in found.items()}
        names = ("num_pairs", "rewards/margins", "rewards/accuracies")
        row |= {f"train/{of}/{key}": 0.5 for of in ("one-set-of-a-mixture", "two") for key in names}
        row |= {"kl": 0.1, "aux_loss": 1.0, "perf/mixer_padding": 0.1, "perf/mfu": 0.4}
        row |= {f"experts/{of}{side}": 0.1 for of in ("", "layer_0/", "layer_1/") for side in ("busiest", "idlest")}
    found = picture.draw(
        read_run(make_run(logged, config=f"loss: {{loss_type: {loss_type}}}", data={"lengths": LENGTHS}))
    )
    check_words(found)
