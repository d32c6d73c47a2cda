"""Races of the head leave a JSON, a table and a chart that say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import head_report
from benchmarks.contenders import LOGPS, LOSS, Contender, UnavailableError, contenders
from benchmarks.shapes import HeadShape
from benchmarks.test_linear_dpo import targets


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_write_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(task):
        raise UnavailableError("is not installed")

    monkeypatch.setattr(head_report, "CPU_BENCHMARK", HeadShape(32, 16, 200))
    monkeypatch.setattr(head_report, "RESPONSE_LENGTH", 4)
    chosen = {task: [c for c in contenders(task) if c.ours or c.name == "naive logits"] for task in (LOSS, LOGPS)}
    race = head_report.race_on("random", {**chosen, LOSS: [*chosen[LOSS], Contender("a peer", 3, absent)]})
    race.round()
    race.round()
    result = head_report.write_race("head", "A head", {"random": race}, targets=targets, folder=tmp_path)

    written = json.loads((tmp_path / "head.json").read_text())
    assert written == {"date": written["date"], **result}
    rows = {(row["task"], row["contender"]): row for row in result["rows"]}
    ours = rows[LOSS, "ours: linear_dpo_loss"]
    floor = rows[LOSS, "bare products: 3"]
    assert ours["x own floor"] == pytest.approx(ours["ms"] / floor["ms"])
    assert rows[LOSS, "ours: linear_logps"]["x 3G floor"] == pytest.approx(
        rows[LOSS, "ours: linear_logps"]["ms"] / floor["ms"]
    )
    assert rows[LOGPS, "ours: linear_logps"]["G"] == 1
    assert "dX error" not in rows[LOGPS, "ours: linear_logps"]
    page = (tmp_path / "head.md").read_text()
    assert "not run: is not installed" in page
    assert "target, time: linear_dpo_loss at most 1.04x of three bare products" in page
    assert result["target, memory"].endswith("MiB beyond the results: " + f"{ours['extra MiB']:.4g}, met")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
