"""Files and folders that are either whole or not there, whatever kills the process in between.

A folder is written under a temporary name beside its final one, every file is flushed to disk, a manifest with the size
and checksum of each file is written last, and only then is the folder renamed. A reader trusts a folder only when its
manifest is there and fits.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import files
from ..errors import UserError, disk_error
from ..files import replace_file, sync

MANIFEST = "manifest.json"
TEMPORARY_SUFFIX = ".incomplete"
_CHUNK_BYTES = 8 << 20
CONTINUE = "free space or choose another train.output_dir, then continue with --resume"
"""What to do when a training run cannot write."""


@contextmanager
def disk_errors(path: Path, *, advice: str = CONTINUE) -> Iterator[None]:
    """Turn a full, read-only or failing disk into a ``UserError`` that names ``path`` and says what to do."""
    try:
        yield
    except Exception as error:
        found = disk_error(error)
        if found is None:
            raise
        raise UserError(f"cannot write {path}: {found[0]}; {advice}") from error


def write_atomically(path: Path, text: str, *, advice: str = CONTINUE) -> None:
    """Replace ``path`` by a file of ``text``; a reader sees the old file or the new one.

    Raises:
        UserError: the disk is full or not writable; it ends with ``advice``.
    """
    with disk_errors(path, advice=advice):
        replace_file(path, text.encode("utf-8"))


def temporary_path(path: Path) -> Path:
    """Where ``write_folder`` collects the files of the folder ``path``."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


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
    target.write_text(json.dumps({"files": manifest}, indent=1) + "\n", encoding="utf-8")
    for place in (target, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(place)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in ``folder``. Only for a folder that no other process writes to."""
    for path in (p for suffix in (TEMPORARY_SUFFIX, files.TEMPORARY_SUFFIX) for p in folder.glob(f".*{suffix}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; a kill in the middle leaves nothing under its name, and the rest to ``remove_leftovers``."""
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        os.replace(path, temporary)
        sync(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Create ``folder`` where it is absent and hold it for this process; one that was created and stays empty goes.

    Raises:
        UserError: it cannot be created or written, or another process holds it.
    """
    existed = folder.exists()
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise UserError(f"cannot create train.output_dir={folder}: {error.strerror}; choose another") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    try:
        with only_writer(folder):
            yield
    finally:
        if not existed:
            # Fails, as it should, for a folder that holds anything.
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the system lets go when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another training process: wait for it, stop it, or choose another "
                "train.output_dir"
            ) from error
        except OSError as error:
            # Some network file systems have no locks; training there is as it was without one.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
        yield
    finally:
        os.close(descriptor)


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
