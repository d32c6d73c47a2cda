"""The ``dpo`` command: its surface, its errors and exit codes, and a whole small job through it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_kernels.tuning.command import build_parser
from engine import cli, commands
from engine.config.fields import iter_keys
from engine.config.help import config_help
from engine.errors import SeveralErrors, UserError

ROOT = Path(__file__).resolve().parents[2]
SURFACE = Path(__file__).with_name("cli_surface.txt")


@pytest.fixture
def refused(capsys):
    """Run arguments that must fail; the one error line."""

    def run(*arguments: object) -> str:
        assert cli.main([str(a) for a in arguments]) == 2
        captured = capsys.readouterr()
        *before, last = captured.err.rstrip("\n").splitlines()
        assert last.startswith("error: ")
        # progress bars may come before it, another error may not
        assert not [line for line in before if "error" in line.lower()]
        assert "Traceback" not in captured.err + captured.out
        return last

    return run


@pytest.fixture
def run_file(tmp_path, tiny_model_dir, pairs_jsonl):
    """A small run on the tiny model and the tiny pairs."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{model_name_or_path: {tiny_model_dir}, dtype: float32}}\n"
        f"data: {{dataset_name: {pairs_jsonl}, eval_dataset_name: {pairs_jsonl}, eval_dataset_split: train}}\n"
        f"packing: {{pairs_per_step: 8, tokens_per_pack: 1024}}\n"
        f"reference: {{store: {tmp_path / 'store'}}}\n"
        f"train: {{output_dir: {tmp_path / 'run'}, max_steps: 2, logging_steps: 1}}\n"
    )
    return path


def surface() -> str:
    """Every command, its arguments and options, and every configuration key, one a line."""
    _, parsers = cli.build_parser()
    lines = []
    for name, parser in sorted(parsers.items()):
        arguments = [a.metavar for a in parser._actions if not a.option_strings]
        lines.append(" ".join(["dpo", name, *map(str, arguments)]))
        lines += sorted(f"dpo {name} {flag}" for flag in parser.own_flags())
    tune = build_parser("dpo bench tune")
    lines += sorted(f"{tune.prog} {flag}" for action in tune._actions for flag in action.option_strings)
    lines += [line.strip() for line in config_help(width=10**6).splitlines() if line.startswith("  --")]
    return "\n".join(lines) + "\n"


def test_the_surface_is_frozen():
    # a new line here is a promise to users; a changed or removed one breaks somebody's script
    assert surface().splitlines() == SURFACE.read_text().splitlines()


def test_every_command_has_a_body_and_a_help(capsys):
    _, parsers = cli.build_parser()
    for name in parsers:
        assert callable(getattr(commands, name))
        assert cli.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"dpo {name}" in text
        assert ("--loss.beta" in text) == parsers[name].takes_config
    assert cli.main([]) == 0
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("dpo-kernels ")


def test_train_help_lists_every_key(capsys):
    cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "--resume" in text
    assert not [key for key, _ in iter_keys() if f"--{key} " not in text]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["init", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from engine.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'tyro', 'numpy', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: dpo" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["unknown command trian", "did you mean train?"]),
        (["qqqq"], ["unknown command qqqq", "dpo --help"]),
        (["--foo"], ["--foo"]),
        (["train"], ["CONFIG is missing"]),
        (["train", "--loss.beta", "0.2", "run.yaml"], ["CONFIG is missing", "it comes first"]),
        (["train", "absent.yaml"], ["absent.yaml: no such file", "dpo init"]),
        (["train", "absent.yaml", "--resum"], ["--resum", "did you mean --resume?"]),
        (["train", "absent.yaml", "--beta", "1"], ["--beta", "did you mean --loss.beta?"]),
        (["train", "a.yaml", "b.yaml"], ["b.yaml"]),
        (["report"], ["RUN"]),
        (["report", "run", "--loss.beta", "1"], ["--loss.beta", "takes no configuration keys"]),
        (["init", "--from_trl", "x"], ["--from_trl", "did you mean --from-trl?"]),
        (["init", "--from-trl"], ["--from-trl", "expected one argument"]),
        (["init", "--num-processes", "2"], ["--num-processes", "--from FILE"]),
        (["init", "--num-processes", "0", "--from-trl", "x"], ["--num-processes", "at least 1"]),
        (["init", "--from-trl", "absent.yaml"], ["absent.yaml: no such file"]),
        (["precompute", "absent.yaml", "--export"], ["--export", "expected one argument"]),
    ],
)
def test_misuse_is_one_line(refused, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    message = refused(*arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("command", ["check", "plan", "precompute", "train", "evaluate"])
def test_every_command_with_a_config_refuses_bad_keys(refused, tmp_path, command):
    path = tmp_path / "run.yaml"
    path.write_text("model: {model_name_or_path: m}\ndata: {dataset_nam: d}\n")
    assert "did you mean data.dataset_name?" in refused(command, path)
    path.write_text("model: {model_name_or_path: m}\ndata: {dataset_name: d}\n")
    assert "did you mean --loss.beta?" in refused(command, path, "--loss.bta", "0.2")
    assert "--loss.beta: expected a number, got x" in refused(command, path, "--loss.beta", "x")


def test_missing_models_data_and_runs(refused, run_file, tmp_path):
    assert "absent" in refused("check", run_file, "--model.model_name_or_path", tmp_path / "absent")
    assert "absent.jsonl" in refused("plan", run_file, "--data.dataset_name", tmp_path / "absent.jsonl")
    assert "absent" in refused("report", tmp_path / "absent")
    assert "tokens_per_pack" in refused("plan", run_file, "--packing.tokens_per_pack", "4")
    for size in ("80", "0GiB", "-1GiB", "abc", "-.5GB"):
        expected = f"must be a number above 0 and a unit (GiB, MiB, GB, MB), such as 80GiB, got {size};"
        assert expected in refused("plan", run_file, "--memory", size)
    assert "name a key of it, such as --model.model_name_or_path" in refused("check", run_file, "--model", "m")
    assert "must be at least 1" in refused("plan", run_file, "--processes", "0")
    assert "--processes: must be a whole number, got two" in refused("plan", run_file, "--processes", "two")
    assert "native runs on the CPU" in refused("plan", run_file, "--device", "cuda", "--model.attention", "native")
    assert "--export" in refused("precompute", run_file, "--export", tmp_path / "rows.csv")
    assert "no reference" in refused("precompute", run_file, "--loss.loss_type", "orpo")
    assert "there is nothing to compute" in refused("precompute", run_file, "--reference.sync_ref_model", "true")


def _raise(error: BaseException):
    def body(options, overrides):
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (UserError("row 3:\n  is broken"), "error: row 3: is broken"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a"), "/runs/a: no space left on the disk"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/runs/a"), "/runs/a: permission denied"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left on the disk; free space"),
        (torch.OutOfMemoryError("Allocation failed"), "out of GPU memory: lower packing.tokens_per_pack"),
        (RuntimeError("CUDA error: out of memory\nCompile with"), "out of GPU memory: lower packing.tokens_per_pack"),
        (MemoryError(), "out of memory: lower packing.tokens_per_pack"),
    ],
)
def test_problems_of_the_machine_are_user_errors(refused, monkeypatch, error, part):
    monkeypatch.setattr(commands, "report", _raise(error))
    assert part in refused("report", "run")


def test_memory_that_the_cpu_allocator_does_not_get_is_a_user_error(refused, monkeypatch):
    monkeypatch.setattr(commands, "report", lambda options, overrides: torch.empty(1 << 60))
    assert refused("report", "run").startswith("error: out of memory: lower packing.tokens_per_pack")


@pytest.mark.parametrize(
    ("name", "value"),
    [(None, "expandable_segments:True"), ("PYTORCH_CUDA_ALLOC_CONF", "a:1"), ("PYTORCH_ALLOC_CONF", "a:1")],
)
def test_the_allocator_grows_its_segments_unless_the_user_has_set_it(name, value):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    environment = {k: v for k, v in os.environ.items() if k not in names} | ({name: value} if name else {})
    code = (
        "import os, sys\nfrom engine import cli\ncli.main(['--version'])\n"
        f"print([os.environ.get(n) for n in {names}], 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    expected = [value if n == (name or "PYTORCH_ALLOC_CONF") else None for n in names]
    assert ended.stdout.splitlines()[-1] == f"{expected} False"


def test_a_user_error_behind_another_exception_is_found(refused, monkeypatch):
    error = RuntimeError("worker failed")
    error.__cause__ = UserError("row 3 is broken")
    monkeypatch.setattr(commands, "report", _raise(error))
    assert refused("report", "run") == "error: row 3 is broken"


def test_several_user_errors_are_a_line_each(monkeypatch, capsys):
    several = SeveralErrors(UserError("row 3\n is broken"), UserError("row 4 is broken"))
    monkeypatch.setattr(commands, "report", _raise(several))
    assert cli.main(["report", "run"]) == 2
    assert capsys.readouterr().err == "error: row 3 is broken\nerror: row 4 is broken\n"


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(commands, "report", _raise(KeyError("x")))
    with pytest.raises(KeyError):
        cli.main(["report", "run"])


def test_debug_adds_the_traceback(monkeypatch, capsys):
    monkeypatch.setattr(commands, "report", _raise(UserError("row 3 is broken")))
    assert cli.main(["report", "run", "--debug"]) == 2
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert captured.err.endswith("error: row 3 is broken\n")


def test_interruption_is_one_line_and_130(monkeypatch, capsys):
    monkeypatch.setattr(commands, "report", _raise(KeyboardInterrupt()))
    assert cli.main(["report", "run"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def _in_a_new_process(arguments: list[str], **streams) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "engine", *arguments]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **streams)


def test_a_closed_pipe_is_silent():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        assert _in_a_new_process(["train", "--help"], stdout=closed).stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_output_to_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = _in_a_new_process(["init", "--output", str(tmp_path / "run.yaml")], stdout=full)
    assert done.returncode == 2
    assert done.stderr == "error: output: no space left on the disk; free space or choose another place\n"


def test_init_check_plan(run_file, tmp_path, capsys):
    template = tmp_path / "new.yaml"
    assert cli.main(["init", "--output", str(template)]) == 0
    assert "dpo check" in capsys.readouterr().out
    assert template.read_text().startswith("# A run of `dpo train`.")
    assert cli.main(["check", str(run_file)]) == 0
    assert "24" in capsys.readouterr().out
    assert cli.main(["plan", str(run_file), "--data.max_rows", "5"]) == 0
    assert "preference groups" in capsys.readouterr().out
    assert cli.main(["plan", str(run_file), "--memory", "2 GB", "--processes", "2", "--data.max_rows", "5"]) == 0
    assert "fits 1.86 GiB" in capsys.readouterr().out


def test_a_file_that_would_lose_something_writes_nothing(tmp_path, refused):
    source, target = tmp_path / "dpo.sh", tmp_path / "run.yaml"
    source.write_text("swift rlhf --model m --dataset d --tuner_type adalora\n")
    assert "dpo.sh, line 1: tuner_type" in refused("init", "--from", source, "--output", target)
    assert not target.exists()


def test_init_from_trl_prints_what_it_changed(tmp_path, capsys):
    source, target = tmp_path / "trl.yaml", tmp_path / "run.yaml"
    source.write_text("model_name_or_path: m\ndataset_name: d\nmax_prompt_length: 512\npadding_free: true\n")
    assert cli.main(["init", "--from-trl", str(source), "--output", str(target), "--num-processes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "These change the result:\n  max_prompt_length: removed from TRL" in printed
    assert "packing.pairs_per_step 16" in printed
    assert "pairs_per_step: 16" in target.read_text()


def test_precompute_exports_columns_that_can_be_checked_and_used(run_file, tmp_path, capsys, refused):
    exported = tmp_path / "rows.jsonl"
    assert cli.main(["precompute", str(run_file), "--export", str(exported)]) == 0
    printed = capsys.readouterr().out
    assert "train: 24 rows computed" in printed
    assert "wrote 24 rows" in printed
    rows = [json.loads(line) for line in exported.read_text().splitlines()]
    assert all(row["ref_chosen_logps"] < 0 > row["ref_rejected_logps"] for row in rows)

    assert cli.main(["precompute", str(run_file)]) == 0
    assert "train: 24 rows reused, none computed" in capsys.readouterr().out
    assert "has no columns ref_chosen_logps" in refused("precompute", run_file, "--import-columns")

    use_columns = ["--data.dataset_name", str(exported), "--data.eval_dataset_name", "null"]
    assert cli.main(["precompute", str(run_file), *use_columns]) == 0
    assert "the rows have reference columns" in capsys.readouterr().out
    assert cli.main(["precompute", str(run_file), *use_columns, "--import-columns"]) == 0
    assert "the reference columns fit the model" in capsys.readouterr().out
    rows[7]["ref_chosen_logps"] -= 100
    exported.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "row 7 " in refused("precompute", run_file, *use_columns, "--import-columns")


def test_an_export_without_columns_is_refused_before_anything_is_computed(run_file, tmp_path, refused, monkeypatch):
    data = tmp_path / "scored.jsonl"
    data.write_text(json.dumps({"prompt": "Q?", "responses": [" a", " b", " c"], "scores": [1, 3, 2]}) + "\n")
    monkeypatch.setattr("engine.precompute._datasets", lambda config, **_: pytest.fail("the data was tokenised"))
    arguments = ("--export", tmp_path / "out.jsonl", "--data.dataset_name", data)
    assert "scored completions have no columns for references" in refused("precompute", run_file, *arguments)


def test_train_evaluate_report(run_file, tmp_path, capsys, refused):
    output = tmp_path / "run"
    assert cli.main(["train", str(run_file)]) == 0
    assert (output / "metrics.jsonl").exists()
    assert cli.main(["evaluate", str(run_file), "--model", str(output)]) == 0
    assert cli.main(["report", str(output)]) == 0
    assert capsys.readouterr().out.strip().endswith("index.html")
    assert str(output) in refused("train", run_file)


def test_doctor_exit_code_follows_the_self_test(capsys, monkeypatch):
    from engine import doctor

    assert cli.main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "diagnose", lambda: ("not healthy", False))
    assert cli.main(["doctor"]) == 1


def test_bench_hands_its_arguments_to_pytest_and_keeps_results_apart(monkeypatch, capsys):
    """What the repository holds is written with --publish alone."""
    pytest.importorskip("pytest_benchmark")
    called = {}

    def call(command, cwd, env):
        called.update(command=command, cwd=cwd, results=Path(env["DPO_BENCH_RESULTS"]))
        if called["results"] != cwd / "benchmarks" / "results":
            (called["results"] / "cpu").mkdir()
            (called["results"] / "cpu" / "train.md").write_text("# train\n")
        return 5

    monkeypatch.setattr(subprocess, "call", call)
    assert cli.main(["bench", "-k", "train", "--benchmark-only"]) == 5
    assert called["command"][-3:] == ["-k", "train", "--benchmark-only"]
    assert (called["cwd"] / "benchmarks").is_dir()
    assert not called["results"].is_relative_to(called["cwd"])
    said = capsys.readouterr().out
    assert str(called["results"]) in said
    assert "  cpu/train.md" in said
    shutil.rmtree(called["results"])
    assert cli.main(["bench", "--publish", "-k", "train"]) == 5
    assert called["command"][-2:] == ["-k", "train"]
    assert called["results"] == called["cwd"] / "benchmarks" / "results"
    assert "look at `git diff`" in capsys.readouterr().out


def test_benchmarks_write_where_they_are_told(tmp_path):
    code = "from benchmarks.results import write_result; print(write_result('t', {'rows': [{'a': 1}]}, columns=['a']))"
    environment = {**os.environ, "DPO_BENCH_RESULTS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(tmp_path), done.stderr


def test_bench_tune_is_the_tuner(refused, monkeypatch, tmp_path):
    """Also outside of a checkout: the tuner is a part of the package."""
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "engine" / "commands.py"))
    assert "--hidden-size and --vocab-size go together" in refused("bench", "tune", "--hidden-size", "64")
    assert "see `dpo bench tune --help`" in refused("bench", "tune", "--row", "64")
    assert cli.main(["bench", "tune", "--help"]) == 0


def test_a_broken_tile_table_is_one_line():
    from dpo_kernels.kernels.tile_config import TileTableError

    error = RuntimeError("in an op")
    error.__cause__ = TileTableError(Path("tiles.json"), "format: expected 1, got 2")
    assert (cli.explain(error) or "").startswith("tiles.json: format: expected 1, got 2; correct or delete")


def test_bench_outside_a_checkout_explains(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "engine" / "commands.py"))
    assert "source checkout" in refused("bench")


def test_no_command_lets_torch_warn_of_a_cuda_toolkit(monkeypatch, refused, caplog):
    """``torch.compile`` imports what looks for one, on the CPU, too."""
    from torch.utils import cpp_extension

    refused("report", "absent")
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cpp_extension._find_cuda_home() == "/usr/local/cuda"
    assert caplog.text == ""
