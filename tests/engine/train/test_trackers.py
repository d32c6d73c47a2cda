"""Trackers: files of this machine, and services, which stand-ins with the signatures of the real packages play."""

from __future__ import annotations

import errno
import inspect
import json
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from engine.config.schema import TrainConfig
from engine.errors import UserError
from engine.train.loop import train
from engine.train.services import SERVICES
from engine.train.trackers import JsonlTracker, check_trackers, keep_rows_until, open_trackers

SIGNATURES = {
    # wandb 0.31, mlflow 3.17, trackio 0.43, swanlab 0.10
    "wandb.init": "entity project dir id name notes tags config config_exclude_keys config_include_keys "
    "allow_val_change group job_type mode force reinit resume resume_from fork_from save_code tensorboard "
    "sync_tensorboard monitor_gym settings anonymous",
    "wandb.log": "data step commit",
    "trackio.init": "project name group space_id server_url dataset_id bucket_id config resume settings private embed "
    "auto_log_gpu gpu_log_interval auto_log_cpu cpu_log_interval webhook_url webhook_min_level",
    "trackio.log": "metrics step",
    "swanlab.init": "reinit log_dir mode workspace project public name color description job_type group tags id resume "
    "parallel config settings callbacks",
    "swanlab.log": "data step",
    "mlflow.create_run": "experiment_id start_time tags run_name",
    "mlflow.log_batch": "run_id metrics params tags synchronous",
    "mlflow.update_run": "run_id status name",
    "mlflow.set_terminated": "run_id status end_time",
    "mlflow.create_experiment": "name artifact_location tags",
    "mlflow.get_experiment_by_name": "name",
    "mlflow.Metric": "key value timestamp step model_id dataset_name dataset_digest run_id",
    "mlflow.Param": "key value",
    "mlflow.log_text": "run_id text artifact_file",
    "wandb.Table": "columns data rows dataframe dtype optional allow_mixed_types log_mode",
    "trackio.Table": "columns data dataframe rows optional allow_mixed_types log_mode",
    "swanlab.Text": "content caption",
}


def bound(name: str, args: tuple, options: dict) -> dict:
    """The arguments of a call by name; only those that the real function has."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return (
        inspect.Signature([inspect.Parameter(p, kind) for p in SIGNATURES[name].split()])
        .bind_partial(*args, **options)
        .arguments
    )


class Stand:
    """A service: what was begun, logged and ended there. ``broken`` makes every call of a run raise."""

    def __init__(self, name: str):
        self.name, self.broken = name, False
        self.begun: list[dict] = []
        self.rows: list[tuple[int, dict]] = []
        self.ended = 0
        self.texts: dict[str, str] = {}
        """Of MLflow, by the names of files."""

    def module(self) -> SimpleNamespace:
        if self.name == "mlflow":
            made = {kind: lambda *a, k=kind, **o: bound(f"mlflow.{k}", a, o) for kind in ("Metric", "Param")}
            return SimpleNamespace(MlflowClient=lambda: self, entities=SimpleNamespace(**made), __spec__=object())
        kinds = [kind for kind in ("Table", "Text") if f"{self.name}.{kind}" in SIGNATURES]
        made = {kind: lambda *a, k=kind, **o: bound(f"{self.name}.{k}", a, o) for kind in kinds}
        return SimpleNamespace(init=self.init, login=lambda **_: True, __spec__=object(), **made)

    def init(self, *args, **options):
        begun = bound(f"{self.name}.init", args, options)
        self.begun.append(begun)
        identity = begun.get("id") or "first"
        # trackio knows a run by its name
        return SimpleNamespace(id=identity, name=begun["name"], log=self.log, finish=self.finish)

    def log(self, *args, **options):
        self._may_fail()
        found = bound(f"{self.name}.log", args, options)
        values = found.get("data", found.get("metrics"))
        self.rows.append((found["step"] if "step" in found else values["train/step"], values))

    def finish(self):
        self._may_fail()
        self.ended += 1

    def _may_fail(self):
        if self.broken:
            raise ConnectionError("the service is gone\nsee the log")

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="7") if self.begun else None

    def create_experiment(self, *args, **options):
        return bound("mlflow.create_experiment", args, options) and "7"

    def create_run(self, *args, **options):
        self.begun.append(bound("mlflow.create_run", args, options) | {"id": None})
        return SimpleNamespace(info=SimpleNamespace(run_id="first"))

    def update_run(self, *args, **options):
        self.begun.append({"id": bound("mlflow.update_run", args, options)["run_id"]})

    def log_batch(self, *args, **options):
        self._may_fail()
        found = bound("mlflow.log_batch", args, options)
        assert len(found.get("params", ())) <= 100
        if "params" in found:
            self.begun[-1].setdefault("config", {}).update({p["key"]: p["value"] for p in found["params"]})
        else:
            self.rows.append((found["metrics"][0]["step"], {m["key"]: m["value"] for m in found["metrics"]}))

    def log_text(self, *args, **options):
        self._may_fail()
        found = bound("mlflow.log_text", args, options)
        self.texts[found["artifact_file"]] = found["text"]

    def set_terminated(self, *args, **options):
        bound("mlflow.set_terminated", args, options)
        self.finish()


@pytest.fixture
def services(monkeypatch):
    """Every service, with a stand-in for its package."""
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"):
        monkeypatch.delenv(variable, raising=False)
    stands = {name: Stand(name) for name in SERVICES}
    for name, stand in stands.items():
        monkeypatch.setitem(sys.modules, name, stand.module())
    return stands


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_continues_its_run_after_a_resume(name, services, tmp_path):
    stand = services[name]
    config = TrainConfig(report_to=(name,), run_name="mine", project="ours")
    (tmp_path / "config.yaml").write_text("loss: {beta: 0.2}\n")
    check_trackers((name,))
    for step in (1, 2):
        trackers = open_trackers(tmp_path, config, first_step=step)
        for tracker in trackers:
            tracker.log(step, {"step": step, "loss": 0.5})
            tracker.flush()
            tracker.close()
    assert [(step, values["loss"]) for step, values in stand.rows] == [(1, 0.5), (2, 0.5)]
    assert stand.ended == 2
    begun, again = stand.begun
    assert begun.get("config") in ({"loss": {"beta": 0.2}}, {"loss.beta": "0.2"})
    if name == "trackio":
        assert [(b["project"], b["name"], b["resume"]) for b in stand.begun] == [
            ("ours", "mine", "never"),
            ("ours", "mine", "allow"),
        ]
    else:
        assert [begun.get("id"), again.get("id")] == [None, "first"]
        assert begun.get("run_name", begun.get("name")) == "mine"


SAMPLES = [
    {"step": step, "row": row, "prompt": f"Why {row}?", "greedy": f"{row} at {step}\n```", "sampled": "no"}
    for step in (0, 20)
    for row in (3, "4 of a set")
]


@pytest.mark.parametrize("name", SERVICES)
def test_samples_of_all_steps_stand_beside_each_other(name, services, tmp_path):
    stand = services[name]
    tracker = open_trackers(tmp_path, TrainConfig(report_to=(name,)), first_step=1)[1]
    for step in (0, 20):
        tracker.show(step, [sample for sample in SAMPLES if sample["step"] <= step])
    if name == "mlflow":
        text = stand.texts["samples.md"]
        parts = (
            "## Row 3",
            "    Why 3?",
            "### Step 0",
            "    3 at 0\n    ```",
            "### Step 20",
            "3 at 20",
            "## Row 4 of a set",
        )
        assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
        assert text.count("## Row 3") == 1
        return
    (_, first), (_, last) = stand.rows[-2:]
    if name == "swanlab":
        assert list(last) == ["samples/row 3", "samples/row 4 of a set"]
        assert "3 at 20" in last["samples/row 3"]["content"]
        assert "3 at 0" in first["samples/row 3"]["content"]
        return
    assert last["samples"]["columns"] == ["row", "prompt", "step", "most likely", "drawn"]
    assert [row[:1] + row[2:4] for row in last["samples"]["data"]] == [
        [str(row), step, f"{row} at {step}\n```"] for row in (3, "4 of a set") for step in (0, 20)
    ]


@pytest.mark.parametrize("name", SERVICES)
def test_samples_that_a_service_does_not_take_do_not_end_the_run(name, services, tmp_path, caplog):
    tracker = open_trackers(tmp_path, TrainConfig(report_to=(name,)), first_step=1)[1]
    services[name].broken = True
    tracker.show(0, SAMPLES)
    assert f"report_to {name} did not take the samples of step 0 (ConnectionError" in caplog.text


def test_tensorboard_has_a_text_for_each_prompt(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_trackers(tmp_path, TrainConfig(report_to=("tensorboard",)), first_step=1)[1]
    for step in (0, 20):
        tracker.show(step, SAMPLES)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["tensors"]) == ["samples/row 3/text_summary", "samples/row 4 of a set/text_summary"]
    found = events.Tensors("samples/row 3/text_summary")
    assert [event.step for event in found] == [0, 20]
    assert b"3 at 20" in found[1].tensor_proto.string_val[0]


@pytest.mark.parametrize("name", SERVICES)
def test_a_run_is_named_after_its_folder_unless_it_is_named(name, services, tmp_path, monkeypatch):
    folder = tmp_path / "hh"
    folder.mkdir()
    open_trackers(folder, TrainConfig(report_to=(name,)), first_step=1)
    begun = services[name].begun[0]
    assert begun.get("run_name", begun.get("name")) == "hh"
    if name == "wandb":
        monkeypatch.setenv("WANDB_PROJECT", "theirs")
        open_trackers(folder, TrainConfig(report_to=(name,)), first_step=1)
        open_trackers(folder, TrainConfig(report_to=(name,), project="key"), first_step=1)
        assert [b["project"] for b in services[name].begun] == ["dpo-kernels", "theirs", "key"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_fails_does_not_end_the_run(name, services, make_config, tmp_path, caplog, monkeypatch):
    opened, stand = [], services[name]
    inner = JsonlTracker.log

    def breaks(tracker, step, values):
        stand.broken = step >= 2
        opened.append(step)
        inner(tracker, step, values)

    monkeypatch.setattr(JsonlTracker, "log", breaks)
    with caplog.at_level("WARNING"):
        result = train(make_config(train={"report_to": [name, "tensorboard"], "max_steps": 6}))
    assert (result.steps, opened) == (6, [1, 2, 3, 4, 5, 6])
    assert [step for step, _ in stand.rows] == [1]
    assert (
        f"report_to {name} did not take step 2 (ConnectionError: the service is gone); training goes on" in caplog.text
    )
    assert caplog.text.count("did not take") == 3
    assert "step 4 (ConnectionError: the service is gone); training goes on; no more are sent" in caplog.text
    assert f"report_to {name} lacks 5 rows; metrics.jsonl has all" in caplog.text


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_does_not_begin_is_a_user_error(name, services, tmp_path, monkeypatch):
    stand = services[name]

    def refuse(*_, **__):
        raise RuntimeError("nobody is logged in.\nhint")

    for method in ("init", "create_run"):
        monkeypatch.setattr(stand, method, refuse)
    monkeypatch.setitem(sys.modules, name, stand.module())
    with pytest.raises(UserError, match=rf"^train\.report_to {name}: nobody is logged in; [^;]+$"):
        open_trackers(tmp_path, TrainConfig(report_to=(name,)), first_step=1)
    assert not list(tmp_path.glob("*_run_id.txt"))


def test_rows_past_a_checkpoint_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 0.5}) for s in (1, 2, 3)] + [json.dumps({"step": 2, "eval_loss": 1.0})]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    keep_rows_until(tmp_path, 2, evaluated_at=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2]
    keep_rows_until(tmp_path, 2, evaluated_at=1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(line) for line in lines[:2]]
    tracker = JsonlTracker(tmp_path)
    tracker.log(3, {"step": 3})
    tracker.close()
    assert path.read_text().splitlines()[-1] == '{"step": 3}'
    keep_rows_until(tmp_path, 0, evaluated_at=0)
    assert path.read_text() == ""
    keep_rows_until(tmp_path / "nowhere", 0, evaluated_at=0)


@pytest.mark.parametrize(
    "damaged", [b"{", b"\xff\n", b'{"step" 2}\n', b'{"st\xf0p": 2}\n', b'{"step": null}\n', b"[2]\n", b"\n"]
)
def test_a_damaged_row_is_named(damaged, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + damaged + b'\n{"step": 3, "loss": 0.5}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged: repair or remove the line"):
        keep_rows_until(tmp_path, 3, evaluated_at=0)
    assert path.read_bytes() == before


def test_tensorboard_hides_events_past_a_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, steps in ((1, (1, 2, 3)), (3, (3, 4))):
        trackers = open_trackers(tmp_path, TrainConfig(report_to=("tensorboard",)), first_step=first_step)
        for tracker in trackers:
            for step in steps:
                tracker.log(step, {"step": step, "loss": step + first_step * 0.1})
            tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    got = [(e.step, round(e.value, 3)) for e in events.Scalars("loss")]
    assert got == [(1, 1.1), (2, 2.1), (3, 3.3), (4, 4.3)]


def test_a_tracker_that_is_not_installed_is_a_user_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "tensorboard", "mlflow", "trackio", "swanlab"):
        with pytest.raises(UserError, match=rf"report_to {name} needs {name}: pip install {name}"):
            check_trackers((name,))
    check_trackers(())


@pytest.mark.parametrize("mode", [None, "online", "offline", "disabled"])
def test_wandb_without_a_login_is_a_user_error(mode, tmp_path, monkeypatch):
    def refuse(**options):
        raise RuntimeError("api_key not configured")

    wandb = SimpleNamespace(init=refuse, login=refuse, Error=RuntimeError, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    with nullcontext() if mode in ("offline", "disabled") else pytest.raises(UserError, match="wandb login"):
        check_trackers(("wandb",))
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        open_trackers(tmp_path, TrainConfig(report_to=("wandb",)), first_step=1)


def test_a_full_disk_is_a_user_error(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker._file.close()
    tracker._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics\.jsonl: no space left"):
        tracker.log(1, {"step": 1})


def test_tensorboard_on_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
    tracker = open_trackers(tmp_path, TrainConfig(report_to=("tensorboard",)), first_step=1)[1]

    def full(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(tracker._writer, "add_scalar", full)
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: the file is larger"):
        tracker.log(1, {"step": 1, "loss": 0.5})
