"""Files and folders that are either whole or not there, whatever kills the process in between.

A folder is written under a temporary name beside its final one, every file is flushed to disk, a manifest with the size
and checksum of each file is written last, and only then is the folder renamed. A reader trusts a folder only when its
manifest is there and fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError, disk_fault
from .plain_json import to_json

MANIFEST = "manifest.json"
FILE_SUFFIX = ".tmp"
"""Of a file that is being written, under its temporary name."""
FOLDER_SUFFIX = ".incomplete"
"""Of such a folder."""
_CHUNK_BYTES = 8 << 20
CONTINUE = "choose another train.output_dir, then continue with --resume"
"""What to do when a training run cannot write, beside what the fault itself calls for."""


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` under a temporary name beside ``path``, flush it to disk and rename it.

    Raises:
        OSError: it cannot be written; what was at ``path`` is untouched and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}{FILE_SUFFIX}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk. A rename is durable once its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, *, elsewhere: str = CONTINUE) -> Iterator[None]:
    """Turn a full, read-only or failing disk into a ``UserError`` that names ``path`` and says what to do about the
    fault, or ``elsewhere``."""
    try:
        yield
    except Exception as error:
        found = disk_fault(error)
        if found is None:
            raise
        raise UserError(f"cannot write {path}: {found.what}; {found.remedy(elsewhere)}") from error


def write_atomically(path: Path, text: str, *, elsewhere: str = CONTINUE) -> None:
    """Replace ``path`` by a file of ``text``; a reader sees the old file or the new one.

    Raises:
        UserError: the disk is full or not writable; it ends with ``elsewhere``.
    """
    with disk_errors(path, elsewhere=elsewhere):
        replace_file(path, text.encode("utf-8"))


def temporary_path(path: Path) -> Path:
    """Where ``write_folder`` collects the files of the folder ``path``."""
    return path.with_name(f".{path.name}{FOLDER_SUFFIX}")


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Create the folder ``path`` with what ``fill`` writes into the folder that it is given.

    Args:
        path: must not exist as a complete folder; what a killed process left under this name is replaced.
        fill: writes the files.

    Raises:
        UserError: the disk is full or not writable; nothing is left under the final name.
    """
    temporary = temporary_path(path)
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            seal(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)


def seal(folder: Path, *, editable: Collection[str] = ()) -> None:
    """Flush every file of ``folder`` and write the manifest.

    Args:
        editable: names of files that are not in the manifest, so that people may change them.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(max_workers=4) as pool:
        entries = list(pool.map(_flushed_entry, files))
    named = zip((p.relative_to(folder).as_posix() for p in files), entries, strict=True)
    manifest = {name: entry for name, entry in named if name not in editable}
    target = folder / MANIFEST
    target.write_text(to_json({"files": manifest}, indent=1) + "\n", encoding="utf-8")
    for place in (target, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(place)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in ``folder``. Only for a folder that no other process writes to."""
    for path in (p for suffix in (FOLDER_SUFFIX, FILE_SUFFIX) for p in folder.glob(f".*{suffix}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; a kill in the middle leaves nothing under its name, and the rest to ``remove_leftovers``."""
    temporary = path.with_name(f".{path.name}{FOLDER_SUFFIX}")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        os.replace(path, temporary)
        sync(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file has the size that it states. Reads no content."""
    return _first_fault(folder) is None


def check_content(folder: Path, *, remedy: str) -> None:
    """Raise a ``UserError`` that names the first file that is not what the manifest says, and ``remedy``."""
    fault = _first_fault(folder)
    if fault is None:
        files = _manifest(folder)
        with ThreadPoolExecutor(max_workers=4) as pool:
            found = pool.map(checksum, [folder / name for name in files])
            changed = (n for n, digest in zip(files, found, strict=True) if digest != files[n]["sha256"])
            name = next(changed, None)
        if name is None:
            return
        fault = f"{folder / name} is damaged: its content does not match its checksum"
    raise UserError(f"{fault}; {remedy}")


def _first_fault(folder: Path) -> str | None:
    """What is wrong with a folder, as far as sizes tell; None when nothing is."""
    try:
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in _manifest(folder).items()}
    except FileNotFoundError:
        return f"{folder / MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST} is damaged: it is no list of files"
    for name, (size, _) in files.items():
        try:
            found = (folder / name).stat().st_size
        except (OSError, ValueError):
            return f"{folder / name} is missing"
        if found != size:
            return f"{folder / name} is damaged: it has {found:,} bytes instead of {size:,}"
    return None


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _flushed_entry(path: Path) -> dict[str, int | str]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def _manifest(folder: Path) -> dict[str, dict]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
