"""Runs on a stream: the bits of runs on the same rows, resumption within any window, and what ends a run late."""

from __future__ import annotations

import json
import shutil
import weakref

import datasets
import pytest

from engine import cli
from engine.check import check
from engine.config import to_yaml
from engine.data import windows
from engine.data.groups import PreferenceDataset
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.precompute import fill_store
from engine.run_folder import TRAIN_SOURCE, of_sources
from engine.train.checkpoint import complete_checkpoints, read_state
from engine.train.loop import train
from tests.engine.conftest import preference_rows
from tests.engine.train.conftest import read_rows
from tests.engine.train.test_resume import interrupted_after, run_files


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def streamed(make_config, tmp_path, monkeypatch):
    """``streamed(name, section={...})``: a run of eight steps of six pairs, in windows of two steps."""
    monkeypatch.setattr("engine.data.sources.unreachable", lambda endpoint: None)

    def streamed(name, **sections):
        data = {"streaming": True, "stream_window": 12, **sections.pop("data", {})}
        own = {"max_steps": 8, "save_steps": 3, "output_dir": str(tmp_path / name), **sections.pop("train", {})}
        return make_config(data=data, train=own, **{"reference": {"mode": "live"}, **sections})

    return streamed


@pytest.fixture
def on_hub(monkeypatch, tmp_path):
    """A dataset ``org/pairs`` of 40 rows in three shards, which ``datasets`` streams from files."""
    rows, load = preference_rows(40, seed=5), datasets.load_dataset
    shards = [tmp_path / f"shard{n}.jsonl" for n in range(3)]
    for n, shard in enumerate(shards):
        shard.write_text(lines(rows[n * 14 : n * 14 + 14]))

    def load_dataset(name, config, *, split, streaming=False):
        assert streaming
        return load("json", data_files={split: list(map(str, shards))}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return "org/pairs"


@pytest.mark.parametrize(
    ("data", "packing", "steps"),
    [({"stream_window": 24}, {}, 8), ({"stream_window": 1000}, {}, 8), ({}, {"shuffle": False}, 4)],
    ids=["a window that is the set", "a larger window", "windows in order"],
)
def test_a_stream_is_learned_to_the_bits_of_the_same_rows_read_whole(data, packing, steps, streamed, tmp_path):
    for name, more in (("stream", data), ("whole", {"streaming": False})):
        result = train(streamed(name, data=more, packing=packing, train={"max_steps": steps}))
        assert result.steps == steps
    files = [run_files(tmp_path / name) for name in ("stream", "whole")]
    for rows in files if data.get("stream_window") != 1000 else ():
        # Of a stream that does not end in its first window, the share of an epoch is that of all steps.
        rows["metrics"] = [{k: v for k, v in row.items() if k != "epoch"} for row in json.loads(rows["metrics"])]
    assert files[0] == files[1]


def test_a_run_resumes_to_the_same_bits_within_any_window(streamed, on_hub, tmp_path):
    """In the middle of a window, and between two; the second pass over the stream begins in the fourth."""
    options = {"data": {"dataset_name": on_hub}, "model": {"lora": {"r": 4, "dropout": 0.2}}}
    train(streamed("run", **options, train={"save_steps": 1}))
    for after in (2, 5, 7):
        stopped = tmp_path / f"stopped{after}"
        shutil.copytree(tmp_path / "run", stopped)
        (stopped / "manifest.json").unlink()
        for step, path in complete_checkpoints(stopped):
            if step > after:
                shutil.rmtree(path)
        assert train(streamed(stopped.name, **options, train={"save_steps": 1}), resume=True).resumed_from == after
        assert run_files(stopped) == run_files(tmp_path / "run")


def test_a_bad_row_late_in_the_stream_ends_the_run_with_what_is_done_saved(streamed, tmp_path):
    rows = preference_rows(60, seed=6)
    path, whole = tmp_path / "rows.jsonl", lines(rows)
    path.write_text(whole)
    data = {"dataset_name": str(path)}
    train(streamed("whole", data=data))
    path.write_text(lines([*rows[:40], {**rows[40], "chosen": None}, *rows[41:]]))
    config = streamed("run", data=data)
    message = r"rows\.jsonl, row 40 \(line 41\).*; the run ended after step 6 of 8: correct this, then go on with --res"
    with pytest.raises(UserError, match=message):
        train(config)
    assert [step for step, _ in complete_checkpoints(tmp_path / "run")] == [3, 6]
    with pytest.raises(UserError, match=message):
        train(config, resume=True)
    path.write_text(whole)
    assert train(config, resume=True).resumed_from == 6
    assert run_files(tmp_path / "run") == run_files(tmp_path / "whole")


def test_a_run_that_read_its_rows_whole_goes_on_with_a_stream_of_them(streamed, tmp_path, monkeypatch):
    options = {"stream_window": 24}
    train(streamed("run", data=options, train={"max_steps": 14}))
    config = streamed("stopped", data={"streaming": False}, train={"max_steps": 14})
    with interrupted_after(monkeypatch, rows=10), pytest.raises(KeyboardInterrupt):
        train(config)
    result = train(streamed("stopped", data=options, train={"max_steps": 14}), resume=True)
    assert (result.resumed_from, result.steps) == (9, 14)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "stopped")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "files",
            r"the stream was read from a\.jsonl, b\.jsonl, and is now from rows\.jsonl, where the rows that come",
        ),
        ("max_rows", r"the training data is not what it was \(data\.max_rows was None and is now 30\); restore it"),
    ],
)
def test_a_stream_of_which_only_later_windows_are_others_does_not_go_on(
    change, message, streamed, tmp_path, monkeypatch
):
    rows = preference_rows(40, seed=6)
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        (tmp_path / f"{name}.jsonl").write_text(lines(part))
    data = {"dataset_name": [str(tmp_path / f"{name}.jsonl") for name in "ab"]}
    with interrupted_after(monkeypatch, rows=5), pytest.raises(KeyboardInterrupt):
        train(streamed("run", data=data))
    if change == "files":
        (tmp_path / "rows.jsonl").write_text(lines(rows))
        data = {"dataset_name": str(tmp_path / "rows.jsonl")}
    else:
        data |= {"max_rows": 30}
    with pytest.raises(UserError, match=message):
        train(streamed("run", data=data), resume=True)


def test_no_more_than_three_windows_are_ever_held(streamed, on_hub, monkeypatch):
    """Counted: the groups of all datasets alive, and how far reading is ahead of training."""
    alive: weakref.WeakSet[PreferenceDataset] = weakref.WeakSet()
    held, read, trained = [], [0], []
    made, take = PreferenceDataset.__init__, windows._SetStream.take

    def noted(dataset, *args, **options):
        made(dataset, *args, **options)
        alive.add(dataset)
        held.append(sum(len(one) for one in alive))

    def counted(stream, count, report, **options):
        groups = take(stream, count, report, **options)
        read[0] += report.total
        return groups

    monkeypatch.setattr(PreferenceDataset, "__init__", noted)
    monkeypatch.setattr(windows._SetStream, "take", counted)
    train(
        streamed("run", data={"dataset_name": on_hub}, train={"max_steps": 20}, packing={"shuffle": True}),
        callbacks=[lambda step, values: trained.append(read[0] - 6 * step)],
    )
    assert len(held) == 10
    # The window that the next one replaces is held until it is done with.
    assert max(held) <= 4 * 12
    assert max(trained) <= 4 * 12


def test_references_in_columns_are_read_window_by_window(streamed, tmp_path, monkeypatch):
    # The columns are made up, which the start-up check would find.
    monkeypatch.setattr("engine.train.references.verify_rows", lambda *a, **k: None)
    monkeypatch.setattr("engine.train.setup.check_first_loss", lambda *a, **k: 0.0)
    rows = preference_rows(40)
    with_sums = [row | {"ref_chosen_logps": -50.0 - i, "ref_rejected_logps": -60.0} for i, row in enumerate(rows)]
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(with_sums))
    options = {"reference": {"mode": "auto"}, "packing": {"shuffle": False}, "train": {"max_steps": 6}}
    losses = [
        train(streamed(name, data={"dataset_name": str(path), "streaming": name == "stream"}, **options)).metrics[
            "loss"
        ]
        for name in ("stream", "whole")
    ]
    assert losses[0] == losses[1]
    path.write_text(lines([*with_sums[:24], *rows[24:]]))
    with pytest.raises(
        UserError, match=r"row 24 and those after it have no ref_chosen_logps .*ended after step 4 of 6"
    ):
        train(streamed("late", data={"dataset_name": str(path)}, **options))


def test_what_is_asked_for_without_being_able_to_is_refused(streamed, tmp_path):
    for sections, message in (
        ({"train": {"max_steps": -1}}, r"train\.max_steps is missing: rows of data\.streaming are not counted"),
        ({"reference": {"mode": "stored"}}, r"reference\.mode stored: rows of data\.streaming are in no store"),
    ):
        with pytest.raises(UserError, match=message):
            train(streamed("run", **sections))
    with pytest.raises(UserError, match=r"data\.streaming computes references while training"):
        fill_store(streamed("run"))
    assert not (tmp_path / "run").exists()


def test_epochs_count_where_the_length_is_known(streamed, tmp_path, pairs_jsonl):
    """Of a set that ends in its first window, and of one that says how many rows it has."""
    rows = [json.loads(line) for line in pairs_jsonl.read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    epochs = {"max_steps": -1, "num_train_epochs": 1.5}
    for name, data in (("one", {"stream_window": 30}), ("two", {"dataset_name": str(tmp_path / "saved")})):
        result = train(streamed(name, data=data, train=epochs))
        assert result.steps == 6
        assert result.metrics["epoch"] == 1.5


def test_the_commands_say_that_they_look_at_the_first_window(streamed, on_hub, tmp_path, capsys):
    config = streamed("run", data={"dataset_name": on_hub})
    found = check(config)
    assert "a stream: of each set the first 12 rows are looked at" in found.text
    assert "org/pairs: 12 preference rows, 12 kept" in found.text
    assert found.obstacles == ()
    unknown = check(streamed("run", data={"dataset_name": on_hub}, train={"max_steps": -1}))
    assert [reason for reason in unknown.obstacles if "train.max_steps is missing" in reason]
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    assert cli.main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    assert "a stream: figures are of its first window, 12 rows" in said
    assert "2 per window, 6 groups each" in said


def test_sets_of_a_mixture_are_streamed_by_weight(streamed, on_hub, pairs_jsonl, tmp_path, monkeypatch):
    sets = [{"name": str(pairs_jsonl), "weight": 1}, {"name": on_hub, "weight": 2, "label": "large"}]
    data = {"dataset_name": None, "datasets": sets}
    train(streamed("run", data=data))
    window = [of_sources(TRAIN_SOURCE, row) for row in read_rows(tmp_path / "run")[-2:]]
    assert {name: sum(parts[name]["num_pairs"] for parts in window) for name in ("pairs", "large")} == {
        "pairs": 4,
        "large": 8,
    }
    state = read_state(complete_checkpoints(tmp_path / "run")[-1][1])
    assert state["stream"]["window"] == 4
    config = streamed("stopped", data=data)
    with interrupted_after(monkeypatch, rows=5), pytest.raises(KeyboardInterrupt):
        train(config)
    assert train(config, resume=True).resumed_from == 3
    assert run_files(tmp_path / "stopped") == run_files(tmp_path / "run")


def test_evaluation_rows_are_read_whole_and_compared_with_the_first_window(streamed, on_hub, tmp_path, caplog):
    (tmp_path / "eval.jsonl").write_text(lines(preference_rows(40, seed=5)[:5]))
    config = streamed("run", data={"dataset_name": on_hub, "eval_dataset_name": str(tmp_path / "eval.jsonl")})
    result = train(config)
    assert "5 of 5 evaluation rows are not held out" in caplog.text
    assert evaluate(config, str(tmp_path / "run"))["eval_loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)


def test_processes_that_read_other_rows_are_told_apart(streamed, monkeypatch):
    def gather(value):
        return [value, (*value[:3], "another")] if isinstance(value, tuple) else [value]

    monkeypatch.setattr("engine.train.feed.distributed.gather", gather)
    with pytest.raises(UserError, match="processes have read different rows"):
        train(streamed("run"))
