"""pip as on a machine that knows PyPI alone: no local wheels, no other index, no constraints of the system."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja")
"""What the README installs before flash-attn, whose setup runs without build isolation."""

_TRANSPORT = ("PIP_CERT", "PIP_PROXY", "PIP_CACHE_DIR", "PIP_DEFAULT_TIMEOUT", "PIP_RETRIES")


class ResolutionError(Exception):
    """pip found no set of versions; the message is what pip says."""


def environment() -> dict[str, str]:
    """The variables of this process without pip's settings, those apart that say how to reach a server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") or k in _TRANSPORT}
    return kept | {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONNOUSERSITE": "1",
    }


def create(folder: Path, *packages: str) -> Path:
    """A virtual environment with the newest pip and ``packages``; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(python, "install", "--upgrade", "pip", *packages)
    return python


def site_packages(python: Path) -> Path:
    """Where an interpreter keeps its packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def run(python: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """What ``python -m pip`` prints.

    Raises:
        ResolutionError: it failed.
    """
    command = [str(python), "-m", "pip", *arguments]
    done = subprocess.run(command, env=environment() | dict(variables or {}), capture_output=True, text=True)
    if done.returncode:
        # What asks for which version is information to pip, and no error.
        _, found, cause = done.stdout.partition("The conflict is caused by:")
        raise ResolutionError(f"{done.stderr.strip()}\n{found}{cause.partition('To fix this')[0].rstrip()}".strip())
    return done.stdout


def resolve(python: Path, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Metadata of every package that ``pip install`` would install into an empty environment. Wheels are not fetched:
    PyPI serves their metadata.

    Raises:
        ResolutionError: no set of versions fits, or an sdist tells nothing of itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--report", str(report)]
        run(python, "install", *options, *arguments, variables=variables)
        return [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]


def build_wheel(python: Path, source: Path, folder: Path) -> Path:
    """The wheel of the checkout ``source``, built in ``folder`` by ``python``'s own setuptools."""
    settings = folder / "build.cfg"
    settings.write_text(
        f"[build]\nbuild_base = {folder / 'build'}\n[egg_info]\negg_base = {folder}\n", encoding="utf-8"
    )
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    run(python, "wheel", *options, str(source), variables={"DIST_EXTRA_CONFIG": str(settings)})
    return next(folder.glob("*.whl"))
