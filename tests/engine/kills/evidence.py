"""What a run leaves behind, in a form in which two runs can be compared, and what must hold after a kill."""

from __future__ import annotations

import json
import logging
import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from engine.durable import MANIFEST, check_content
from engine.errors import UserError
from engine.model.sources import SHARDS
from engine.reference.shards import TEMPORARY_AGE_SECONDS, read_keys, read_values
from engine.train.checkpoint import STATE_FILE, complete_checkpoints

METRICS = "metrics.jsonl"
PERF = "perf/"
"""Prefix of the metrics that measure time."""


class FaultError(Exception):
    """Something was lost, or the end is not the same."""


class InexactError(FaultError):
    """The end is not the same."""


def stored_values(store: Path) -> dict[str, str]:
    """Key -> checksum of its log-probs, over all shards of a store, read as files.

    Raises:
        FaultError: a shard is damaged, or one key has two values.
    """
    found: dict[str, str] = {}
    for path in sorted(store.rglob("*.parquet")):
        try:
            keys, values = read_keys(path).view("V16").tolist(), read_values(path)
        except UserError as error:
            raise FaultError(str(error)) from error
        for row, key in enumerate(keys):
            content = sha256(values.flat[values.offsets[row] : values.offsets[row + 1]].tobytes()).hexdigest()
            if found.setdefault(key.hex(), content) != content:
                raise FaultError(f"two values of key {key.hex()}")
    return found


def leavings(place: Path) -> dict[str, Any]:
    """All that the run in ``place/run`` left, by name, without what measures time; empty when there is no run."""
    run = place / "run"
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = path.relative_to(run).as_posix()
        if name == METRICS:
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == STATE_FILE:
            found[name] = _timeless(json.loads(_placeless(path, place)))
        elif path.parent.name == SHARDS:
            found[name] = _shards(path)
        elif path.name != MANIFEST and not name.startswith("tensorboard/"):
            # A manifest is checked against the files; it has checksums of files that name the folder.
            found[name] = sha256(_placeless(path, place)).hexdigest()
    if run.is_dir():
        found["complete"] = [step for step, _ in complete_checkpoints(run)]
    if (run / "tensorboard").is_dir():
        found["tensorboard"] = _scalars(run / "tensorboard")
    return found


def _shards(path: Path) -> str:
    """Checksum of a file of shards. The library writes the entries of its header in any order."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    notes = header["__metadata__"]
    notes["DCP_SHARDING_INFO"] = json.loads(notes["DCP_SHARDING_INFO"])
    return sha256(json.dumps(header, sort_keys=True).encode() + content[end:]).hexdigest()


def _placeless(path: Path, place: Path) -> bytes:
    return path.read_bytes().replace(str(place).encode(), b"PLACE")


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not k.startswith(PERF)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(PERF)]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ``InexactError`` with the first difference."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            was, now = (repr(side.get(name, "absent"))[:400] for side in (expected, found))
            raise InexactError(f"{name} is {now}, and without a kill {was}")


def newest_checkpoint(run: Path, saved: set[int]) -> int | None:
    """The step that a killed run can continue from.

    Args:
        saved: steps that the run, and those before it in this folder, reported as durable.

    Raises:
        FaultError: it is older than one that was reported, or damaged.
    """
    complete = complete_checkpoints(run)
    newest = complete[-1] if complete else None
    if saved and (newest is None or newest[0] < max(saved)):
        raise FaultError(f"the checkpoint of step {max(saved)} was durable, and the newest is {newest}")
    if newest is None:
        return None
    try:
        check_content(newest[1], remedy="")
    except UserError as error:
        raise FaultError(str(error)) from error
    return newest[0]


def age_temporaries(store: Path) -> None:
    """Let an hour pass for what a killed writer left, since younger files may belong to a live one."""
    past = time.time() - 2 * TEMPORARY_AGE_SECONDS
    for path in store.rglob("*.tmp"):
        os.utime(path, (past, past))
