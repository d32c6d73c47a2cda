"""The batch script of ``docs/scale-out.md``, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[3] / "docs" / "scale-out.md"
TASKS = 3
COMMANDS = {
    "scontrol": """
if [ "$1" = show ]; then printf 'node0\\nnode1\\n'; else echo "$@" >> "$CALLS"; fi
""",
    # As srun does, ends with the highest code of its tasks.
    "srun": """
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
code=0
for task in "${tasks[@]}"; do wait "$task"; ended=$?; ((ended > code)) && code=$ended; done
exit $code
""",
    "dpo": """
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $*" >> "$CALLS.dpo"
[ -z "$WAIT" ] || sleep 1
[ "$RANK" = 1 ] && exit "$CODE"
exit 0
""",
}


@pytest.fixture
def job(tmp_path):
    """Start the script, with processes one of which ends with a code."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    script = next(block for block in re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.S) if "#SBATCH" in block)
    (tmp_path / "job.sh").write_text(script)
    slurm = {"SLURM_NTASKS": TASKS, "SLURM_CPUS_PER_TASK": 8, "SLURM_JOB_ID": 17, "SLURM_JOB_NODELIST": "node[0-1]"}

    def start(code: int, wait: str = "") -> subprocess.Popen:
        values = slurm | {"CODE": code, "WAIT": wait, "CALLS": tmp_path / "calls"}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["bash", str(tmp_path / "job.sh")], env=os.environ | {k: str(v) for k, v in values.items()} | path
        )

    return start


def calls(tmp_path: Path, name: str) -> list[str]:
    path = tmp_path / name
    return sorted(path.read_text().splitlines()) if path.exists() else []


@pytest.mark.parametrize(("code", "requeued"), [(75, ["requeue 17"]), (0, []), (2, []), (137, [])])
def test_a_job_that_was_asked_to_end_goes_back_into_the_queue_and_no_other(code, requeued, job, tmp_path):
    assert job(code).wait(timeout=60) == code
    assert calls(tmp_path, "calls") == requeued
    assert calls(tmp_path, "calls.dpo") == [f"{i} {i} {TASKS} node0 29500 8 train run.yaml --resume" for i in range(3)]


def test_a_job_that_is_cancelled_waits_for_its_processes_and_stays_out_of_the_queue(job, tmp_path):
    process = job(75, wait="yes")
    while len(calls(tmp_path, "calls.dpo")) < TASKS:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert calls(tmp_path, "calls") == []
