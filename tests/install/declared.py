"""What ``pyproject.toml`` and ``constraints.txt`` ask for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"dpo_kernels": "dpo_kernels", "dpo_engine": "engine"}
"""Installed package -> its folder here."""


def project() -> dict[str, Any]:
    """The table ``[project]``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extra(name: str) -> list[Requirement]:
    """What an extra asks for beside the base, with the extras that it names written out."""
    found = []
    for requirement in map(Requirement, project()["optional-dependencies"][name]):
        if requirement.name == project()["name"]:
            found += [line for other in sorted(requirement.extras) for line in extra(other)]
        else:
            found.append(requirement)
    return found


def bounds() -> dict[str, SpecifierSet]:
    """The versions of each package that the base and the extras allow together."""
    found: dict[str, SpecifierSet] = {}
    for line in [
        *map(Requirement, project()["dependencies"]),
        *(r for name in project()["optional-dependencies"] for r in extra(name)),
    ]:
        found[line.name] = found.get(line.name, SpecifierSet()) & line.specifier
    return found


def pins() -> dict[str, str]:
    """The exact versions of ``constraints.txt``."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pinned}
