"""What commands import before they say something, and what those import that read data alone."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cli, commands
from tests.engine.conftest import preference_rows

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    *("peft", "bitsandbytes", "torch._dynamo", "transformers.modeling_utils", "transformers.generation", "datasets"),
    *("torch.distributed.tensor", "transformers.core_model_loading", "transformers.integrations.hub_kernels"),
    *("pandas", "matplotlib"),
)
TOKENIZERS = """
import sys
from engine.model.tokenizer import leave_activations_out
leave_activations_out()
from transformers import AutoTokenizer
"""
NOT_FOR_MODELS = (
    *("peft", "bitsandbytes", "torch._inductor.lowering", "transformers.trainer_utils", "transformers.optimization"),
    *("pandas", "datasets", "matplotlib"),
)
"""What no full model needs to be trained."""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("command", ["check", "plan", "precompute", "train", "evaluate"])
def test_the_first_line_comes_before_what_takes_seconds(command, tmp_path):
    """Where torch cannot be imported, that line is there all the same."""
    run = tmp_path / "run.yaml"
    run.write_text("model: {model_name_or_path: m}\ndata: {dataset_name: d}\n")
    code = "import sys; sys.modules['torch'] = None; from engine import cli; cli.main(sys.argv[1:])"
    first, *_ = python(code, command, run).stderr.splitlines()
    loaded = "transformers" if command == "check" else "torch and transformers"
    assert first == f"dpo {command} {run}: loading {loaded}"


def test_data_is_read_without_what_models_need():
    code = f"import sys, engine.check; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_a_whole_check_needs_no_more(tiny_model_dir, pairs_jsonl, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{model_name_or_path: {tiny_model_dir}}}\ndata: {{dataset_name: {pairs_jsonl}}}\n")
    code = "import sys; from engine import cli; assert cli.main(['check', sys.argv[1]]) == 0; "
    # The package itself, which configs need, imports next to nothing.
    loaded = f"print([name for name in {HEAVY} if name in sys.modules and name != 'transformers.generation'])"
    # transformers 5.17 brings the code of generation with the class of tokenizers alone
    alone = python(f"{TOKENIZERS}{loaded}")
    assert python(f"{code} {loaded}", run).stdout.splitlines()[-1] == alone.stdout.strip()


CHECK_ALONE = """
import sys
from engine import cli, distributed
distributed.leave = lambda code: print(code, "torch" in sys.modules, file=sys.stderr)
sys.argv[:1] = ["dpo", "check"]
cli.command()
"""


@pytest.mark.parametrize("case", ["text", "date", "margin"])
def test_the_command_alone_checks_without_torch_and_says_the_same(case, tiny_model_dir, tmp_path, monkeypatch, capsys):
    """What needs it by itself, such as the store's date or a question to the table of losses, finds it."""
    rows = preference_rows(3)
    options = {"data.template_date": "2026-01-02"} if case == "date" else {}
    if case == "date":
        rows = [{side: [{"role": "user", "content": "ask"}, {"role": "assistant", "content": side}]
                 for side in ("chosen", "rejected")}]  # fmt: skip
        template = (
            "{{ strftime_now('%d %B') }}{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
        )
        (tmp_path / "dated.jinja").write_text(template)
        options["data.chat_template"] = str(tmp_path / "dated.jinja")
    if case == "margin":
        rows = [row | {"margin": 0.5} for row in rows]
        options["loss.loss_type"] = "apo_zero"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{model_name_or_path: {tiny_model_dir}}}\ndata: {{dataset_name: {tmp_path}/rows.jsonl}}\n")
    overrides = [word for key, value in options.items() for word in (f"--{key}", value)]
    alone = python(CHECK_ALONE, run, *overrides)
    code = cli.main(["check", str(run), *overrides])
    assert alone.stdout == capsys.readouterr().out
    assert alone.stderr.splitlines()[-1] == f"{code} {case != 'text'}"
    assert code == (2 if case == "margin" else 0)


IN_A_ROW = """
import sys
from engine import cli
*words, run = sys.argv[1:]
for word in words:
    assert cli.main([word, run]) == 0, word
    print(f"{word} imports", [name for name in %r if name in sys.modules])
"""
REPORT_ALONE = """
import gc, sys
from engine import cli, distributed
distributed.leave = lambda code: print(code, gc.isenabled(), gc.get_freeze_count() > 10_000, *sys.modules)
sys.argv[:1] = ["dpo", "report"]
cli.command()
"""


def test_a_full_model_needs_neither_adapters_nor_the_trainer_and_a_report_no_model(
    tiny_model_dir, pairs_jsonl, tmp_path
):
    """The imports of those took longer than all else before step 1."""
    with_problem = tmp_path / "rows.jsonl"
    # A row that lint counts, so that the report has a problem to put into words.
    with_problem.write_text(pairs_jsonl.read_text() + pairs_jsonl.read_text().splitlines()[0] + "\n")
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{model_name_or_path: {tiny_model_dir}, dtype: float32}}\n"
        f"data: {{dataset_name: {with_problem}, eval_dataset_name: {pairs_jsonl}}}\n"
        f"packing: {{pairs_per_step: 2}}\nreference: {{store: {tmp_path / 'store'}}}\n"
        f"train: {{output_dir: {tmp_path / 'out'}, max_steps: 1}}\n"
    )
    words = ["plan", "precompute", "train", "evaluate"]
    said = python(IN_A_ROW % (NOT_FOR_MODELS,), *words, run)
    found = [line for line in said.stdout.splitlines() if " imports [" in line]
    assert found == [f"{word} imports []" for word in words], said.stderr
    report = python(REPORT_ALONE, tmp_path / "out")
    code, collects, frozen, *modules = report.stdout.splitlines()[-1].split()
    assert (code, collects, frozen) == ("0", "True", "True")
    assert {"engine.report.page", "engine.data.problems"} <= set(modules)
    assert not {"torch", "transformers", "pyarrow", "pandas", "datasets"} & set(modules)


@pytest.mark.parametrize("alone", [False, True], ids=["a program that imports this", "a command"])
def test_the_collector_rests_in_commands_alone_and_never_for_good(alone, monkeypatch):
    frozen = []
    monkeypatch.setattr(commands, "is_whole_process", alone)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))

    def fail():
        with commands.importing():
            assert gc.isenabled() != alone
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()
    assert len(frozen) == alone
    gc.disable()
    try:
        with commands.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("package", ["engine.model", "engine.data"])
def test_every_name_of_a_package_is_where_it_is_said_to_be(package):
    found = importlib.import_module(package)
    for module, names in found._PLACES.items():
        place = importlib.import_module(f"{package}.{module}")
        for name in names:
            assert getattr(found, name) is getattr(place, name)
    assert sorted(found.__all__) == sorted(name for names in found._PLACES.values() for name in names)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        found.nothing  # noqa: B018
