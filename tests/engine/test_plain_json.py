"""Every file of JSON is JSON: no NaN and no infinity, which other readers refuse."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from engine.plain_json import exact_json, read_exact_json, to_json
from engine.train.samples import add_samples
from engine.train.trackers import JsonlTracker

ROOT = Path(__file__).resolve().parents[2]
HASHED = {
    "engine/reference/keys.py": 2,
    "engine/data/groups.py": 1,
    "engine/data/held_out.py": 1,
    "engine/data/row_cache.py": 3,
    "engine/data/lost_text.py": 2,
    "engine/data/turns.py": 1,
    "engine/config/from_trl.py": 1,
    "engine/train/resume.py": 2,
}
"""Text that is hashed, compared or shown, and never a file of JSON, by the number of its calls."""
ODD = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, None)}], "d": 2}


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def strictly(text):
    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null():
    assert strictly(to_json(ODD)) == {"a": None, "b": [1.5, None, {"c": [None, None]}], "d": 2}
    assert to_json({"b": 1.5, "a": "é"}, sort_keys=True, ensure_ascii=False) == '{"a": "é", "b": 1.5}'
    with pytest.raises(TypeError):
        to_json({"a": object()})


def test_what_a_run_reads_back_is_exact():
    strictly(exact_json(ODD))
    back = read_exact_json(exact_json(ODD, indent=1))
    assert math.isnan(back.pop("a"))
    assert back == {"b": [1.5, -math.inf, {"c": [math.inf, None]}], "d": 2}
    # As earlier versions wrote it.
    assert read_exact_json('{"a": -Infinity}') == {"a": -math.inf}


def test_metrics_and_samples_are_json(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(1, {"step": 1, "loss": math.nan})
    tracker.close()
    assert strictly((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}
    add_samples(tmp_path, [{"step": 1, "row": 0, "greedy": "x", "score": math.inf}])
    assert strictly((tmp_path / "samples.jsonl").read_text())["score"] is None


@pytest.mark.parametrize("package", ["engine", "dpo_kernels", "benchmarks", "examples"])
def test_nothing_else_writes_json(package):
    """Calls of ``json.dumps`` that would write NaN as NaN."""
    found: dict[str, int] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse("" if path.name.startswith("test_") else path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump")):
                continue
            if not any(word.arg == "allow_nan" for word in node.keywords):
                name = path.relative_to(ROOT).as_posix()
                found[name] = found.get(name, 0) + 1
    assert found == {name: count for name, count in HASHED.items() if name.startswith(package)}
