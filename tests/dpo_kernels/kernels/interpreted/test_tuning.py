"""The tuner's search, on the interpreter's own times."""

from __future__ import annotations

import pytest
import torch

from dpo_kernels.kernels.tile_config import read_table
from dpo_kernels.tuning import command, search
from dpo_kernels.tuning.candidates import DRY_CANDIDATES
from dpo_kernels.tuning.problems import Problem, Workload

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("kernel", command.KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heavy", [False, True])
def test_results_do_not_depend_on_the_tile(kernel, dtype, heavy):
    problem = Problem(kernel, dtype, 20, 24, 70, heavy)
    workload = Workload(problem, DEVICE)
    expected = [tensor.clone() for tensor in workload.result(problem.shipped("cpu"))]
    assert all(bool(tensor.isfinite().all()) for tensor in expected)
    for config in DRY_CANDIDATES:
        assert search.agree(workload.result(config), expected)
    assert not search.agree([tensor * 1.05 for tensor in expected], expected)
    expected[-1].view(-1)[3] = float("nan")
    assert not search.agree(workload.result(DRY_CANDIDATES[0]), expected)


def test_wrong_numbers_are_never_chosen(monkeypatch):
    """However fast: a candidate that computes something else is named and left out."""
    problem = Problem("slice_grad", torch.float32, 20, 24, 70, False)
    wrong, right = DRY_CANDIDATES
    true_result = Workload.result

    def result(self, config):
        values = true_result(self, config)
        return [value * 1.01 for value in values] if config == wrong else values

    monkeypatch.setattr(Workload, "result", result)
    cost = {wrong: 0.1, right: 1.0}
    monkeypatch.setattr(search.Search, "_milliseconds", lambda self, workload, config: cost.get(config, 2.0))
    found = search.Search(DEVICE, dry_run=True).tune([problem])
    assert found.wrong == [search.describe_tile(wrong)]
    assert found.tuned
    assert found.best == right
    assert "WRONG NUMBERS: 16x32x16" in found.line()
    # Less than the noise of a clock is no reason to leave the shipped configuration.
    monkeypatch.setattr(search.Search, "_milliseconds", lambda self, workload, config: cost.get(config, 1.0))
    cost[right] = 0.995
    found = search.Search(DEVICE, dry_run=True).tune([problem])
    assert not found.tuned
    assert found.best == problem.shipped("cpu")


def test_an_interrupted_run_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiles.json"
    tune = search.Search.tune

    def stop_at_the_second(self, group):
        if group[0].kernel == "linear_exps":
            raise KeyboardInterrupt
        return tune(self, group)

    monkeypatch.setattr(search.Search, "tune", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        command.run(["--dry-run", "--output", str(path)], prog="dpo bench tune")
    assert set(read_table(path)["cpu"]) == {"linear_stats"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
