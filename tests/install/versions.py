"""The test suite on the oldest, the pinned and the newest allowed versions, from plain PyPI. ``make test-versions``.

Each set gets a virtual environment below ``.venvs/``, of about 7 GB on Linux, where PyPI's torch is a CUDA build. The
suite runs without lint. ``docs/versions.md`` gets one row a set; rows of sets that were not run stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from tests.install import plain_pip
from tests.install.declared import ROOT, pins

TRITON_OF_TORCH = {"2.11": "3.6.0", "2.12": "3.7.0", "2.13": "3.7.1", "2.14": "3.8.0", "2.15": "3.9.0"}
"""The Triton that a release of torch on PyPI requires on Linux, exactly."""

SETS = {
    # The interpreter of Triton 3.6, which tests alone use, takes no newer numpy.
    "oldest": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "numpy": "2.3.5"},
    "pinned": pins(),
    "newest": {"torch": "2.15.0", "transformers": "5.24.0"},
}
"""What each set pins; the rest is the newest that fits."""

SHOWN = ("torch", "triton", "transformers", "tokenizers", "datasets", "numpy", "pyarrow", "peft", "bitsandbytes", "trl")
TABLE = ROOT / "docs" / "versions.md"
_HEAD = """# Versions that were tested

`make test-versions` installs each set from plain PyPI into an environment of its own and runs the test suite there.
The oldest set has the lowest torch, Triton and transformers that `pyproject.toml` allows, the newest the highest; the
rest is what pip takes with them.

"""


class Outcome(NamedTuple):
    """Counts of one run of the suite, and the tests that failed."""

    passed: int
    skipped: int
    failed: list[str]


def prepare(name: str, folder: Path) -> Path:
    """The interpreter of a set, with what the set pins and this checkout."""
    python = folder / "bin" / "python"
    if not python.exists():
        python = plain_pip.create(folder)
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{p}=={v}\n" for p, v in SETS[name].items()), encoding="utf-8")
    plain_pip.run(python, "install", "--constraint", str(constraints), "--editable", f"{ROOT}[dev]")
    return python


def run_suite(python: Path, report: Path, arguments: list[str]) -> Outcome:
    """Run pytest with the packages of ``python`` and read its report; its lines go to the terminal."""
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-n", "auto", "--dist", "loadscope", f"--junit-xml={report}", *arguments]
    # Commands of the environment come first, such as torchrun.
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run(command, cwd=ROOT, env=plain_pip.environment() | {"PATH": path})
    if not report.exists():
        return Outcome(0, 0, ["the run ended without a report"])
    return read_report(report)


def read_report(report: Path) -> Outcome:
    """What a JUnit file of pytest says."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return Outcome(passed, skipped, failed)


def versions_of(python: Path) -> dict[str, str]:
    """The version of Python and of each package that the table shows."""
    code = (
        "import json, platform, sys; from importlib import metadata; "
        "print(json.dumps({'Python': platform.python_version(), **{n: metadata.version(n) for n in sys.argv[1:]}}))"
    )
    done = subprocess.run([str(python), "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def row_of(name: str, versions: dict[str, str], outcome: Outcome, day: str) -> str:
    """A line of the table."""
    counts = [str(outcome.passed), str(len(outcome.failed)), str(outcome.skipped)]
    return "| " + " | ".join([name, *versions.values(), *counts, day]) + " |"


def update_table(rows: dict[str, str], table: Path = TABLE) -> None:
    """Write the table with these rows and those of other sets that it has."""
    titles = ["set", "Python", *SHOWN, "passed", "failed", "skipped", "date"]
    known = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in known if line.startswith("| ")}
    lines = [rows.get(name) or kept.get(name) for name in SETS]
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    # What people wrote below the table stays.
    last = max((i for i, line in enumerate(known) if line.startswith("|")), default=len(known))
    text = "\n".join([*head, *filter(None, lines), *known[last + 1 :]])
    table.write_text(f"{_HEAD}{text}\n", encoding="utf-8")


def main() -> int:
    """Run the sets that the command line names, or all; 1 where a test fails or a set cannot be installed."""
    parser = argparse.ArgumentParser(prog="make test-versions")
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], help="which sets to run (default: all)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venvs", help="where the environments lie")
    parser.add_argument("--tests", action="append", default=[], help="an argument of pytest; writes no table")
    options = parser.parse_args()
    rows, good = {}, True
    for name in options.sets or SETS:
        folder = options.folder.resolve() / name
        print(f"== {name}: {', '.join(f'{p} {v}' for p, v in SETS[name].items())}", flush=True)
        try:
            python = prepare(name, folder)
        except plain_pip.ResolutionError as error:
            print(error)
            good = False
            continue
        outcome = run_suite(python, folder / "report.xml", options.tests)
        print(f"{name}: {outcome.passed} passed, {len(outcome.failed)} failed, {outcome.skipped} skipped")
        print("".join(f"  {test}\n" for test in outcome.failed), end="", flush=True)
        good &= not outcome.failed
        rows[name] = row_of(name, versions_of(python), outcome, datetime.date.today().isoformat())
        if not options.tests:
            update_table(rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
