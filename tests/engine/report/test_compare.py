"""One page about several runs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from engine.cli import main
from engine.errors import UserError
from engine.report import write_comparison
from engine.report.compare import names_of, pictures
from engine.report.records import read_run

CONFIG = "loss: {loss_type: %s, beta: %s}\ntrain: {output_dir: %s, seed: 42}\n"


@pytest.fixture
def runs(make_run, rows):
    """Two runs whose loss, beta and folder differ, with evaluations."""
    found = []
    for name, loss, beta in (("first", "sigmoid", 0.1), ("second", "ipo", 0.5)):
        metrics = rows(20, every=5, eval_every=10)
        for row in metrics:
            if "eval_loss" in row:
                row["eval_logps_change/chosen"] = -row["step"] * beta
        evaluation = {"eval_loss": beta, "eval_rewards/accuracies": 0.75, "eval_num_pairs": 8.0}
        found.append(make_run(metrics, config=CONFIG % (loss, beta, name), evaluation=evaluation, name=name))
    return found


def test_differences_metrics_and_pictures(runs):
    page = write_comparison(runs)
    text = page.read_text().replace("<wbr>", "")
    assert page == runs[0].parent / "comparison.html"
    assert re.search(r"<code>loss.beta</code></td><td>0.1</td><td>0.5</td>", text)
    assert re.search(r"<code>loss.loss_type</code></td><td>sigmoid</td><td>ipo</td>", text)
    assert "train.seed" not in text
    assert "train.output_dir" not in text
    assert re.search(r"<code>loss</code>.*</td><td class=\"number\">0.1000</td><td class=\"number\">0.5000</td>", text)
    captions = re.findall(r'alt="([^"]*)"', text)
    assert len(captions) == text.count("<img") == 6
    assert all(captions)
    assert not re.search(r'(src|href)="(?!data:)', text)


@pytest.mark.parametrize(("losses", "unit"), [(("kto", "kto"), "row"), (("kto", "sigmoid"), "pair or row")])
def test_runs_of_rows_stand_beside_those_of_pairs(losses, unit, make_run, rows):
    """The divergence of KTO is a curve of its own, and no distance of drawn answers."""
    folders = []
    for place, loss in enumerate(losses):
        metrics = rows(20, every=5, eval_every=10)
        for row in metrics if loss == "kto" else ():
            row["eval_kl" if "eval_loss" in row else "kl"] = 0.1 * row["step"]
        evaluation = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75} | ({"eval_kl": 2.0} if loss == "kto" else {})
        config = CONFIG % (loss, 0.1, place)
        folders.append(make_run(metrics, config=config, evaluation=evaluation, name=f"run-{place}"))
    found = [read_run(folder) for folder in folders]
    captions = {caption.partition(":")[0]: figure for caption, figure in pictures(found, names_of(found))}
    assert not any(caption.startswith("Reward against") for caption in captions)
    lines = captions["Held-out divergence from the reference"].axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 2.0]] * losses.count("kto")
    assert f"nats per {unit};" in write_comparison(folders).read_text()


def test_the_frontier_has_a_point_for_each_evaluation(runs):
    found = [read_run(folder) for folder in runs]
    caption, figure = pictures(found, names_of(found))[-1]
    assert caption.startswith("Reward against fall of chosen: held-out reward accuracy over fall of the log-prob")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["first", "second"]
    assert [list(line.get_xdata()) for line in lines] == [[1.0, 2.0], [5.0, 10.0]]
    for folder in runs:
        evaluation = {"eval_kl": 9.0, "eval_sampled/kl": 3.0, "eval_rewards/accuracies": 0.75}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    found = [read_run(folder) for folder in runs]
    caption, figure = pictures(found, names_of(found))[-1]
    assert caption.startswith("Reward against divergence: held-out reward accuracy over KL(policy || reference)")
    assert [list(line.get_xdata()) for line in figure.axes[0].get_lines()] == [[3.0], [3.0]]


def test_each_of_several_evaluation_sets_has_pictures_of_its_own(make_run, rows):
    def of_sets(row):
        own = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
        own |= {"logps_change/chosen": -1.0} if own else {}
        rest = {name: value for name, value in row.items() if not name.startswith("eval_")}
        return rest | {f"eval_{name}_{key}": value for name in ("easy", "hard") for key, value in own.items()}

    metrics = [of_sets(row) for row in rows(20, every=5, eval_every=10)]
    found = [read_run(make_run(metrics, name=name)) for name in ("a", "b")]
    captions = [caption.partition(":")[0] for caption, _ in pictures(found, names_of(found))]
    for title in ("Held-out loss", "Held-out reward accuracy", "Reward against fall of chosen"):
        assert [caption for caption in captions if caption.startswith(title)] == [f"{title}, easy", f"{title}, hard"]
    drawn = {f"eval_easy_{name}": 3.0 for name in ("sampled/kl", "rewards/accuracies")}
    evaluated = [make_run(rows(2), evaluation=drawn, name=name) for name in ("c", "d")]
    found = [read_run(folder) for folder in evaluated]
    assert pictures(found, names_of(found))[-1][0].startswith("Reward against divergence, easy: held-out reward")


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run, rows, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    folders = [make_run(rows(2), name=f"{name}/run") for name in ("a", "b")]
    assert names_of([read_run(folder) for folder in folders]) == ["a/run", "b/run"]


def test_no_words_are_cut_off(make_run, rows, check_words):
    metrics = rows(20, every=5, eval_every=10)
    for row in metrics:
        row |= {"kl": 0.1, "eval_kl": 0.1, "eval_ranking_accuracy": 0.5, "eval_logps_change/chosen": -1.0}
    names = [f"beta=0.1,loss_type=a+long+one,learning_rate={n}e-06,seed={n}" for n in range(9)]
    folders = [
        make_run(metrics, config=CONFIG % (loss, 1, "x"), name=n)
        for loss, n in zip(["kto", *["ipo"] * 8], names, strict=True)
    ]
    found = [read_run(folder) for folder in folders]
    drawn = pictures(found, names)
    assert len(drawn) == 9
    for _, figure in drawn:
        check_words(figure)


@pytest.mark.parametrize(("steps", "count"), [(20, 2), (60, 3), (1, 9), (60, 9)])
def test_equal_runs_are_all_seen(steps, count, make_run):
    """No curve hides another one, however many are the same."""
    names = ("loss", "eval_loss", "eval_rewards/accuracies")
    course = [{"step": n, **dict.fromkeys(names, 1 / n), "eval_logps_change/chosen": -n} for n in range(1, steps + 1)]
    found = [read_run(make_run(course, name=f"{n}")) for n in range(count)]
    drawn = pictures(found, names_of(found))
    assert len(drawn) == 4
    for caption, figure in drawn:
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
        box = figure.axes[0].get_window_extent()
        height = len(pixels)
        inside = pixels[height - int(box.y1) : height - int(box.y0), int(box.x0) : int(box.x1)]
        for line in figure.axes[0].get_lines():
            colour = np.round(255 * np.array(to_rgb(line.get_color()))).astype(int)
            seen = (np.abs(inside - colour).max(-1) <= 16).sum()
            assert seen >= 15, (caption, line.get_label())


def test_runs_of_a_sweep_are_called_by_what_it_varies(make_run, rows):
    folders = [make_run(rows(2), name=f"beta={beta},loss_type=ipo,seed=1") for beta in (0.1, 0.5)]
    assert names_of([read_run(folder) for folder in folders]) == ["beta=0.1", "beta=0.5"]
    folders.append(make_run(rows(2), name="loss_type=ipo,seed=1"))
    assert names_of([read_run(folder) for folder in folders]) == [folder.name for folder in folders]


def test_the_worst_rows_of_each_run_are_there(runs):
    for folder, change in zip(runs, (-4.0, -9.5), strict=True):
        texts = {"prompt": "Why?", "chosen_response": f"fell by {change}", "rejected_response": "no"}
        worst = [{"row": n, "chosen": change + n, "rejected": 0.0, **texts} for n in range(5)]
        (folder / "evaluation_details.json").write_text(json.dumps({"eval": {"most_displaced": worst}}))
    text = write_comparison(runs).read_text()
    assert re.findall(r"<summary>(row .*)</summary>", text) == [
        f"row {n}: {change + n:.3f} nats" for change in (-4.0, -9.5) for n in range(3)
    ]


def test_answers_stand_beside_each_other(runs):
    for folder, answer in zip(runs, ("<yes>", "no"), strict=True):
        samples = [{"step": s, "row": 3, "prompt": "Why?", "greedy": f"{answer} {s}", "sampled": ""} for s in (0, 20)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    text = write_comparison(runs).read_text()
    assert text.count("Why?") == 1
    assert "&lt;yes&gt; 20" in text
    assert "no 20" in text
    assert "no 0" not in text


def test_what_cannot_be_compared(runs, tmp_path, capsys):
    with pytest.raises(UserError, match="the same run is named twice"):
        write_comparison([runs[0], runs[0]])
    with pytest.raises(UserError, match="no run folder at"):
        write_comparison([runs[0], tmp_path / "nowhere"])
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "page.html")]) == 2
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "page.html")
