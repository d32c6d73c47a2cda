"""The loss ops and the command where ``pip install dpo-kernels`` brought torch and nothing else."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from engine.__main__ import NEEDED
from tests.install.declared import ROOT, extra, project

BROUGHT = ["jinja2"]
"""Modules of the extra that torch brings by itself."""
OPS = """
import importlib.util, sys
import torch
from dpo_kernels import describe, linear_dpo_loss, linear_logps, plackett_luce_loss, preference_loss

describe()
for impl in ("auto", "torch", "reference"):
    hidden = torch.randn(12, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    labels = torch.arange(12)
    linear_logps(hidden, weight, labels, impl=impl).sum().backward()
    offsets = torch.tensor([0, 3, 6, 9, 12])
    out = linear_dpo_loss(hidden, weight, labels, offsets, torch.zeros(4), impl=impl)
    out.loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
preference_loss(*torch.randn(4, 3))
plackett_luce_loss(*torch.randn(2, 3, 4))
print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])
"""


@pytest.fixture(scope="session")
def torch_alone(tmp_path_factory) -> Path:
    """A folder of links to torch and what torch itself requires."""
    folder = tmp_path_factory.mktemp("torch-alone")
    names, waiting = set(), ["torch"]
    while waiting:
        if (name := waiting.pop().lower()) in names:
            continue
        names.add(name)
        needed = [Requirement(line) for line in metadata.requires(name) or []]
        waiting += [n.name for n in needed if n.marker is None or n.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in metadata.files(name) or []} - {"..", "__pycache__"}:
            if not (link := folder / top).exists():
                link.symlink_to(metadata.distribution(name).locate_file(top))
    return folder


def run(folder: Path, *arguments: str, sources: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python with the packages of ``folder`` and ``sources``, and no others."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env={"PYTHONPATH": f"{folder}:{sources}", "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_loss_ops_need_torch_alone(torch_alone):
    done = run(torch_alone, "-c", OPS, *NEEDED)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{BROUGHT}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "run.yaml"]])
@pytest.mark.parametrize("start", ["module", "script"])
def test_command_names_what_is_missing(start, arguments, torch_alone, installed):
    module, _, function = project()["scripts"]["dpo"].partition(":")
    how = ["-m", "dpo_engine"] if start == "module" else ["-c", f"from {module} import {function}; {function}()"]
    done = run(torch_alone, *how, *arguments, sources=installed)
    assert done.returncode == 2
    assert done.stdout == ""
    absent = ", ".join(name for name in NEEDED if name not in BROUGHT)
    assert done.stderr == (
        f'error: dpo needs packages that are not installed: {absent}; run: pip install "dpo-kernels[train]"\n'
    )


def test_a_single_missing_package_is_named(torch_alone, tmp_path):
    for name in sorted(set(NEEDED) - {"datasets"}):
        (tmp_path / f"{name}.py").touch()
    done = run(tmp_path, "-m", "engine", "train", "run.yaml")
    assert done.returncode == 2
    assert "not installed: datasets; run: pip" in done.stderr


def test_needed_modules_are_those_of_the_extra():
    modules = {"pyyaml": "yaml"}
    assert sorted(modules.get(line.name, line.name) for line in extra("train")) == sorted(NEEDED)


def test_base_is_torch_alone():
    assert [Requirement(line).name for line in project()["dependencies"]] == ["torch"]
