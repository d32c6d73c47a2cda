"""What commands import before they say something, and what those import that read data alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    *("peft", "bitsandbytes", "torch._dynamo", "transformers.modeling_utils", "transformers.generation", "datasets"),
    *("torch.distributed.tensor", "transformers.core_model_loading", "transformers.integrations.hub_kernels"),
)


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
    assert first == f"dpo {command} {run}: loading torch and transformers"


def test_data_is_read_without_what_models_need():
    code = f"import sys, engine.check; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_a_whole_check_needs_no_more(tiny_model_dir, pairs_jsonl, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{model_name_or_path: {tiny_model_dir}}}\ndata: {{dataset_name: {pairs_jsonl}}}\n")
    code = "import sys; from engine import cli; assert cli.main(['check', sys.argv[1]]) == 0; "
    # The package itself, which configs need, imports next to nothing.
    heavy = [name for name in HEAVY if name != "transformers.generation"]
    last = python(f"{code} print([name for name in {heavy} if name in sys.modules])", run).stdout.splitlines()[-1]
    assert last == "[]"


def test_every_name_of_the_models_is_where_it_is_said_to_be():
    import engine.model as models

    for module, names in models._PLACES.items():
        for name in names:
            assert getattr(models, name).__module__ in (f"engine.model.{module}", f"engine.model.{module}.choice"), name
    assert sorted(models.__all__) == sorted(name for names in models._PLACES.values() for name in names)
    with pytest.raises(AttributeError, match=r"module 'engine\.model' has no attribute 'nothing'"):
        models.nothing  # noqa: B018
