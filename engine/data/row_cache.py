"""Tokenised rows of earlier starts, found by the content that they were made from.

A file holds the rows of one split as Arrow writes them, which are mapped into memory and not read, and what lint found
in them. Its name is the key, a digest of all that rows depend on, and the checksum of the file, which is looked at
before it is used. It appears whole, by one rename: any number of processes may write, read and be killed at once.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from .. import distributed
from ..config.schema import DataConfig
from ..durable import FILE_SUFFIX, checksum, sync
from ..errors import UserError, disk_fault
from ..paths import cache_folder, expanded
from .arrow_rows import from_arrow, to_arrow
from .groups import PreferenceDataset
from .lint import LintReport
from .problems import LOST
from .sets import DataSet
from .tokenize import has_own_chat, template_of, writes_date

LEAST_BYTES = 8 << 20
"""Of the files of a split: what is smaller is tokenised in seconds, and kept where ``data.cache`` is a folder alone."""
UNUSED_DAYS = 30
"""After so long without use a file goes when another one is written."""
_FREE = (
    *("dataset_name", "datasets", "dataset_config", "dataset_train_split", "eval_dataset_name", "eval_dataset_split"),
    *("strict", "cache"),
)
"""Settings of ``data`` that say which rows are read, as ``DataSet`` does, or what is done with them afterwards."""
_OWN = re.compile(
    rf"[0-9a-f]{{64}}\.[0-9a-f]{{64}}\.arrow|\.[0-9a-f]{{64}}\.\d+\.[0-9a-f]{{32}}{re.escape(FILE_SUFFIX)}"
)
"""Names of the files that are written here, whole or not yet."""
_PACKAGES = ("transformers", "tokenizers", "jinja2", "numpy", "pyarrow", "datasets")

Rows = tuple[PreferenceDataset, dict[str, LintReport]]
"""Those of a split, and the report of each of its sets by label."""

log = logging.getLogger(__name__)


def rows_of(sets: Sequence[DataSet], data: DataConfig, tokenizer: Any, make: Callable[[], Rows]) -> Rows:
    """The rows of a split: those of an earlier start, or those that ``make`` makes, which are kept.

    Of several processes the first of each machine makes them, where they are kept, and the others read them. Every rank
    must call this.

    Raises:
        UserError: ``data.cache`` is a folder that cannot be written, or whatever ``make`` raises.
    """
    found = _place(sets, data, tokenizer)
    if not all(distributed.gather(found is not None)):
        return make()
    assert found is not None
    folder, key = found
    with distributed.machine_first("tokenises the rows"):
        rows = read(folder, key, data)
        if rows is None:
            rows = make()
            if _keep(folder, key, rows, data):
                # Mapped, so that all processes of a machine have one copy.
                rows = read(folder, key, data) or rows
        else:
            log.info("%s rows, tokenised before, are read from %s", f"{len(rows[0]):,}", folder)
    return rows


def default_row_folder() -> Path:
    """``rows`` in the cache folder.

    Raises:
        UserError: there is none, since the user has no home.
    """
    return cache_folder("rows", "data.cache")


def _place(sets: Sequence[DataSet], data: DataConfig, tokenizer: Any) -> tuple[Path, str] | None:
    """The folder and the key of the rows; None where they are not kept."""
    if data.cache == "none":
        return None
    files = [one.open().files for one in sets]
    if any(of_set is None for of_set in files):
        return None
    known = [of_set or () for of_set in files]
    if data.cache == "auto" and sum(path.stat().st_size for of_set in known for path in of_set) < LEAST_BYTES:
        return None
    if any(one.data.template_date is None and writes_date(tokenizer, one.data) for one in sets):
        return None
    of_tokenizer = tokenizer_digest(tokenizer)
    if of_tokenizer is None:
        return None
    folder = default_row_folder() if data.cache == "auto" else expanded(data.cache)
    return folder, row_key(sets, known, of_tokenizer)


def row_key(sets: Sequence[DataSet], files: Sequence[Sequence[Path]], tokenizer: str) -> str:
    """A digest of all that the rows of a split depend on.

    Args:
        files: of each set, whose content the rows are.
        tokenizer: ``tokenizer_digest``.
    """
    every = [path for of_set in files for path in of_set]
    with ThreadPoolExecutor(max_workers=4) as pool:
        content = dict(zip(every, pool.map(checksum, every), strict=True))
    parts = {
        "code": _code_digest(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "tokenizer": tokenizer,
        "sets": [
            {
                **asdict(one),
                "data": {key: value for key, value in asdict(one.data).items() if key not in _FREE},
                "template": template_of(one.data),
                "content": [[str(path), content[path]] for path in of_set],
            }
            for one, of_set in zip(sets, files, strict=True)
        ],
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str | None:
    """A digest of all that a tokenizer is, its chat template included; None for one with code of its own, which does
    not say what it does."""
    kind = type(tokenizer)
    if not kind.__module__.startswith("transformers.") or has_own_chat(tokenizer):
        return None
    found = sha256(f"{kind.__module__}.{kind.__qualname__}".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                found.update(json.dumps([path.relative_to(folder).as_posix(), checksum(path)]).encode())
    return found.hexdigest()


def _code_digest() -> str:
    """Of the code that makes rows: a change of it may change them."""
    found = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read(folder: Path, key: str, data: DataConfig) -> Rows | None:
    """Rows that are kept; None where there are none, and where they are damaged, which deletes them."""
    for path in folder.glob(f"{key}.*.arrow"):
        with suppress(FileNotFoundError):
            if checksum(path) != path.name.split(".")[1]:
                log.warning("%s is damaged: its rows are tokenised again", path)
                with suppress(OSError):
                    path.unlink()
                continue
            # Those of another user, or of a folder that is only read, stay as old as they are.
            with suppress(OSError):
                os.utime(path)
            return _parsed(path, data)
    return None


def _parsed(path: Path, data: DataConfig) -> Rows:
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    notes = json.loads(batch.schema.metadata[b"notes"])
    counted = LOST if data.lost_text == "count" else frozenset()
    reports = {label: LintReport.restored(state, counted=counted) for label, state in notes["reports"].items()}
    dataset = from_arrow(batch, notes["sources"])
    if not data.datasets:
        # A mixture's is also of what an epoch takes.
        dataset.digest = notes["digest"]
    return dataset, reports


def _keep(folder: Path, key: str, rows: Rows, data: DataConfig) -> bool:
    """Write rows; whether they are there now. They are in memory, so the default folder need not take them."""
    dataset, reports = rows
    if dataset.labelled_G.any():
        # Files have no labels; losses that read them make their rows anew.
        return False
    notes = {
        "sources": list(dataset.source_names),
        "reports": {label: report.state() for label, report in reports.items()},
        "digest": None if data.datasets else dataset.digest,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, key, to_arrow(dataset), notes)
        _forget_unused(folder)
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        words = f"cannot keep tokenised rows in {folder}: {fault.what}"
        advice = fault.remedy("set data.cache to another folder, or to none")
        if data.cache != "auto":
            raise UserError(f"{words}; {advice}") from error
        log.warning("%s; the next start makes them again (%s)", words, advice)
        return False
    return True


def _write(folder: Path, key: str, batch: pa.RecordBatch, notes: Mapping[str, Any]) -> None:
    temporary = folder / f".{key}.{os.getpid()}.{uuid.uuid4().hex}{FILE_SUFFIX}"
    try:
        schema = batch.schema.with_metadata({b"notes": json.dumps(notes).encode()})
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
        sync(temporary)
        os.replace(temporary, folder / f"{key}.{checksum(temporary)}.arrow")
    finally:
        temporary.unlink(missing_ok=True)
    sync(folder)


def _forget_unused(folder: Path) -> None:
    """Delete rows that no start has read for long, and what killed writers left."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    for path in (*folder.glob("*.arrow"), *folder.glob(f".*{FILE_SUFFIX}")):
        # The folder may hold other files of the user, and those of other users.
        with suppress(OSError):
            if _OWN.fullmatch(path.name) is None:
                continue
            if path.stat().st_mtime < (oldest if path.suffix == ".arrow" else time.time() - 86_400):
                path.unlink()
