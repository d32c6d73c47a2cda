"""One process that fails ends all, with one line; a checkpoint that a process did not finish is none."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from engine import cli, distributed, endings
from engine.config import build_config, to_yaml
from engine.config.schema import ModelConfig
from engine.errors import UserError
from engine.model import load_policy, shard_policy
from engine.model.checks import check_packing
from engine.train.checkpoint import complete_checkpoints, newest_checkpoint
from engine.train.loop import train
from tests.engine.distributed.launch import launch, run_jobs


@pytest.fixture
def values(tiny_model_dir, pairs_jsonl, tmp_path) -> dict:
    return {
        "model": {"model_name_or_path": str(tiny_model_dir), "dtype": "float32"},
        "data": {"dataset_name": str(pairs_jsonl), "max_length": 160},
        "packing": {"pairs_per_step": 12, "tokens_per_pack": 2000},
        "reference": {"store": str(tmp_path / "store")},
        "train": {"output_dir": str(tmp_path / "run"), "report_to": [], "num_train_epochs": 2, "save_steps": 2},
    }


def command(values: dict, folder: Path, name: str, *options: str) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(to_yaml(build_config(values, "test")))
    return ["-m", "engine", name, str(path), *options]


def error_lines(ended) -> list[str]:
    return [line for process in ended for line in process.err.splitlines() if line.startswith("error:")]


def test_a_failure_of_one_process_ends_all_with_one_line(values, tmp_path):
    whole = command(values, tmp_path, "train")
    ended = launch([whole, [*whole, "--train.logging_steps", "0"]])
    assert error_lines(ended) == [
        "error: --train.logging_steps must be a positive whole number of steps or a share below 1, got 0.0"
    ]
    assert [process.code for process in ended] == [2, 2]
    assert not any("Traceback" in process.err for process in ended)
    assert not (tmp_path / "run").exists()


def test_what_all_processes_find_is_said_once(values, tmp_path):
    values["data"]["dataset_name"] = "/nowhere/pairs.jsonl"
    ended = launch([command(values, tmp_path, "precompute")] * 2)
    assert len(error_lines(ended)) == 1
    assert "/nowhere/pairs.jsonl" in error_lines(ended)[0]
    assert [process.code for process in ended] == [2, 2]


def test_a_process_killed_in_a_checkpoint_leaves_none(values, tmp_path):
    run = tmp_path / "run"
    survivor, killed = run_jobs(tmp_path, 2, [{"kind": "die", "config": values}])
    assert (survivor.code, killed.code) == (1, -9)
    assert "a process of this run ended without a message" in survivor.err
    assert [step for step, _ in complete_checkpoints(run)] == [2]
    assert [path.name for path in run.iterdir() if "incomplete" in path.name] == []
    assert train(build_config(values, "test"), resume=True).resumed_from == 2
    resumed = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(run)
    train(build_config(values, "test"))
    whole = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_folder_that_the_first_process_gave_up_is_no_fault_of_another(values, tmp_path):
    first, other = run_jobs(tmp_path, 2, [{"kind": "full disk", "config": values}])
    assert "UserError: cannot write " in first.err.splitlines()[-1]
    assert "no space left on the disk" in first.err.splitlines()[-1]
    assert "PeerFailure" in other.err.splitlines()[-1]
    assert complete_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize(("killed", "who"), [(0, "the first process"), (1, "a process")])
def test_a_process_that_is_killed_ends_the_others_with_one_line(killed, who):
    """The first one hosts the store in which processes agree on who speaks; it is lost with it."""
    code = f"""
import os
from engine import cli, distributed, endings
def work(arguments):
    distributed.barrier()
    if distributed.rank() == {killed}:
        os.kill(os.getpid(), 9)
    distributed.barrier()
cli.run, endings._FAREWELL_SECONDS = work, 0.5
distributed.leave(cli.main([]))
"""
    ended = launch([["-c", code]] * 2)
    assert [process.code for process in ended] == [-9 if rank == killed else 2 for rank in range(2)]
    (line,) = ended[1 - killed].err.splitlines()
    assert line.startswith(f"error: {who} of this run ended")
    assert "continue with --resume" in line


@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_one_process_that_waits_for_another_ends_all_with_one_line(asked):
    """As when the machine of one is taken back while the other reads the model: nothing is there to be saved."""
    code = f"""
import os, threading, time
from engine import cli, distributed, stop
def work(arguments):
    distributed.barrier()
    if distributed.rank() == {asked}:
        threading.Timer(0.2, os.kill, (os.getpid(), 15)).start()
    else:
        until = time.monotonic() + 30
        while not distributed._group.ear.heard and time.monotonic() < until:
            time.sleep(0.05)
    distributed.barrier()
cli.run, stop._STUCK_SECONDS = work, 0.5
distributed.leave(cli.main(["train"]))
"""
    ended = launch([["-c", code]] * 2)
    assert [process.code for process in ended] == [75, 75]
    assert ended[asked].err == "stopped by SIGTERM: run the same command again to go on\n"
    assert ended[1 - asked].err == ""


def test_a_connection_lost_in_the_start_up_check_is_no_fault_of_the_model(tiny_model_dir, monkeypatch):
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir)), device=torch.device("cpu"))

    def lost(batch) -> None:
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr(policy, "logps", lost)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        check_packing(policy)


def test_waiting_in_vain_is_not_taken_for_a_lost_process():
    late = ValueError("no layout")
    late.__cause__ = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10ms for recv")
    assert endings._timed_out(late)
    assert not endings._timed_out(RuntimeError("Connection closed by peer"))


def test_a_failure_after_the_joint_work_of_others_is_said_once(values, tmp_path, pairs_jsonl):
    ended = launch([command(values, tmp_path, "precompute", "--export", str(pairs_jsonl))] * 2)
    assert len(error_lines(ended)) == 1
    assert "is the dataset itself" in error_lines(ended)[0]
    assert [process.code for process in ended] == [2, 2]
    assert not any("Traceback" in process.err for process in ended)


def test_what_several_processes_refuse_is_refused_before_anything_is_read(values, tmp_path):
    values["model"] |= {"quantization": "nf4", "lora": {"r": 4}}
    values["train"]["shards_per_replica"] = 2
    values["data"]["dataset_name"] = values["model"]["model_name_or_path"] = "/nowhere"
    ended = launch([command(values, tmp_path, "train")] * 2)
    (line,) = error_lines(ended)
    assert line.startswith("error: train.shards_per_replica=2 does not fit model.quantization=nf4: ")
    assert [process.code for process in ended] == [2, 2]
    assert not (tmp_path / "run").exists()


def test_weights_that_the_first_process_cannot_read_end_all(values, tmp_path, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    values["model"]["model_name_or_path"] = str(tmp_path / "damaged")
    ended = launch([command(values, tmp_path, "train")] * 2)
    (line,) = error_lines(ended)
    assert "damaged does not load as a causal language model" in line
    assert [process.code for process in ended] == [2, 2]


@pytest.mark.parametrize("name", ["train", "precompute", "evaluate"])
def test_every_command_refuses_it_first(name, values, tmp_path, monkeypatch, capsys):
    values["model"] |= {"model_name_or_path": "/nowhere", "lora": {"r": 4}, "quantization": "nf4"}
    values["data"]["dataset_name"] = "/nowhere"
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "broadcast", lambda found: found)
    arguments = command(values, tmp_path, name)[2:]
    assert cli.main([*arguments, "--train.shards_per_replica", "2"]) == 2
    # Behind the line that says what starts.
    first = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert first.startswith("error: train.shards_per_replica=2 does not fit model.quantization=nf4: ")


def test_a_model_that_is_stored_quantised_is_refused(tiny_model_dir, monkeypatch):
    policy = load_policy(ModelConfig(model_name_or_path=str(tiny_model_dir)), device=torch.device("cpu"))
    policy.causal_lm.hf_quantizer = object()
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(UserError, match="LlamaForCausalLM: its weights are stored quantised"):
        shard_policy(policy, torch.device("cpu"))


def test_trained_weights_of_two_dtypes_are_refused(tiny_model_dir, monkeypatch):
    model = ModelConfig(model_name_or_path=str(tiny_model_dir))
    policy = load_policy(model, device=torch.device("cpu"), weights_dtype="bfloat16")
    policy.causal_lm.model.norm.float()
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(UserError, match=r"stay float32 beside others in bfloat16.*optim\.master_weights to float32"):
        shard_policy(policy, torch.device("cpu"))


@pytest.mark.parametrize("arguments", [["check", "run.yaml"], ["plan", "run.yaml"], ["doctor"], ["demo"], ["init"]])
def test_other_commands_are_refused(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert cli.main(arguments) == 2
    assert f"dpo {arguments[0]} runs in one process: start it without torchrun" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)], ids=str)
def test_a_request_to_one_process_ends_all_after_the_same_step(asked, values, tmp_path):
    """Each is told by its launcher at another time, or some are not told at all."""
    values["packing"]["pairs_per_step"] = 6
    code = f"""
import os
from engine import cli, distributed
from engine.train.optimizer import GuardedUpdate
update, steps = GuardedUpdate.step, []
def step(self, loss):
    steps.append(None)
    if distributed.rank() in {asked} and len(steps) == 3 + distributed.rank():
        os.kill(os.getpid(), 15)
    return update(self, loss)
GuardedUpdate.step = step
distributed.leave(cli.main(["train", {command(values, tmp_path, "train")[3]!r}]))
"""
    ended = launch([["-c", code]] * 2)
    assert [process.code for process in ended] == [75, 75]
    step = 3 + min(asked)
    told = [line for process in ended for line in process.err.splitlines() if "stopped by" in line]
    assert told == [f"stopped by SIGTERM after step {step} of 8: go on with --resume"]
    assert newest_checkpoint(tmp_path / "run") == (step, tmp_path / "run" / checkpoint_name(step))
    resumed = train(build_config(values, "test"), resume=True)
    assert (resumed.resumed_from, resumed.steps) == (step, 8)


def checkpoint_name(step: int) -> str:
    """That of a run of ``values``, which saves every second step, when it is asked to end."""
    return f"checkpoint-{step}" + ("-stopped" if step % 2 else "")


@pytest.mark.parametrize(("asked", "moment"), [(0, "joined"), (0, "at work"), (1, "at work")])
def test_a_request_before_the_first_step_ends_all_with_its_code(asked, moment):
    code = f"""
import os, time
from engine import cli, distributed
def asked(moment):
    if distributed.rank() == {asked} and moment == {moment!r}:
        os.kill(os.getpid(), 15)
        time.sleep(60)
join = distributed._join
def joined():
    join()
    asked("joined")
def work(arguments):
    distributed.barrier()
    asked("at work")
    distributed.barrier()
distributed._join, cli.run = joined, work
distributed.leave(cli.main(["train"]))
"""
    ended = launch([["-c", code]] * 2)
    assert [process.code for process in ended] == [75, 75]
    assert "".join(process.err for process in ended) == "stopped by SIGTERM: run the same command again to go on\n"


def test_a_silent_process_is_named_with_its_machine():
    code = """
import os
from engine import cli, distributed
def work(arguments):
    distributed.barrier()
    if distributed.rank() == 2:
        print(os.getpid(), flush=True)
        os._exit(3)
    distributed.barrier()
cli.run = work
distributed.leave(cli.main([]))
"""
    *others, silent = launch([["-c", code]] * 3)
    told = [line for process in others for line in process.err.splitlines()]
    assert len(told) == 1
    assert f"without a message: rank 2, process {silent.out.strip()} on {socket.gethostname()} (killed" in told[0]


@pytest.mark.parametrize(("name", "option"), [("train", "train.output_dir=run"), ("precompute", "reference.store=run")])
def test_a_folder_that_one_machine_does_not_see_is_named_with_it(name, option, values, tmp_path):
    """The processes work in different folders, so that a relative path is two folders, as local disks are."""
    values["train"]["output_dir"] = values["reference"]["store"] = "run"
    code = f"""
import os, socket
from engine import cli, distributed, shared_folders
rank = os.environ["RANK"]
folder = os.path.join({str(tmp_path)!r}, rank)
os.mkdir(folder)
os.chdir(folder)
socket.gethostname = lambda: "node" + rank
shared_folders._PATIENCE_SECONDS = 0.5
distributed.leave(cli.main([{name!r}, {command(values, tmp_path, name)[3]!r}]))
"""
    ended = launch([["-c", code]] * 2)
    assert error_lines(ended) == [
        f"error: {option} is not shared: what node0 writes there is not seen on node1; "
        "choose a folder on a file system that all machines share"
    ]
    assert [process.code for process in ended] == [2, 2]
    assert [str(path) for path in tmp_path.rglob(".shared*")] == []


def test_how_long_processes_wait_is_a_setting():
    code = """
import time
from engine import cli, distributed
def work(arguments):
    distributed.barrier()
    distributed.set_timeout(0.02)
    if distributed.rank() == 0:
        time.sleep(5)
    distributed.barrier()
cli.run = work
distributed.leave(cli.main([]))
"""
    ended = launch([["-c", code]] * 2)
    assert [process.code for process in ended] == [2, 2]
    (line,) = error_lines(ended)
    assert line.startswith("error: this process has waited more than 0.02 minutes (train.timeout_minutes) for another")


def test_what_the_first_process_does_alone_is_announced_once(values, tmp_path):
    values["train"]["timeout_minutes"] = 7
    first, other = launch([command(values, tmp_path, "train")] * 2)
    assert first.code == other.code == 0
    said = [line for line in first.out.splitlines() if "the others wait, at most 7 minutes" in line]
    works = ("reads the model", "flushes checkpoints to the disk and adds checksums", "writes the model")
    assert [line.partition(";")[0] for line in said] == [f"the first process {work}" for work in works]
    assert other.out == ""
