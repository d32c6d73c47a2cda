"""Does every way to install this package resolve on plain PyPI? ``make check-install``.

pip resolves the base, each extra, each under ``constraints.txt`` and each set of ``make test-versions``, in dry run and
for this Python, with local wheels, other indexes and pip's configuration switched off. It downloads no wheel but those
of small build tools. One line a case; the exit code is 1 where a case fails, after the resolver's own words.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.install import plain_pip
from tests.install.declared import ROOT, pins, project
from tests.install.versions import SETS, TRITON_OF_TORCH

AT_ONCE = 4
SHOWN = ("torch", "triton", "transformers", "trl", "flash-attn")
BUILT_ON_TORCH = "flash"
"""The extra whose packages ask torch how to build themselves."""


class Case(NamedTuple):
    """One install."""

    title: str
    arguments: list[str]
    check: Callable[[dict[str, dict[str, Any]]], str | None]
    """What is wrong with the packages found, by name; None for nothing."""
    needs_torch: bool = False


def cases(wheel: Path, folder: Path) -> Iterator[Case]:
    """All installs; ``wheel`` is this package."""
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    extras = [name for name in project()["optional-dependencies"] if name != BUILT_ON_TORCH]
    for added, check in (([], brought_by_torch), (constraints, pins_are_met)):
        title = "  -c constraints.txt" if added else ""
        yield Case(f".{title}", [str(wheel), *added], check)
        for name in extras:
            yield Case(f".[{name}]{title}", [f"{wheel}[{name}]", *added], check)
    yield Case(f".[dev,bench]{title}", [f"{wheel}[dev,bench]", *constraints], every_pin_is_used)
    yield Case(f".[{BUILT_ON_TORCH}]", [f"{wheel}[{BUILT_ON_TORCH}]", "--no-build-isolation"], brought_by_torch, True)
    for name, versions in SETS.items():
        path = folder / f"{name}.txt"
        path.write_text("".join(f"{package}=={version}\n" for package, version in versions.items()), encoding="utf-8")
        yield Case(f".[dev]  {name} versions", [f"{wheel}[dev]", "--constraint", str(path)], brought_by_torch)


def brought_by_torch(found: dict[str, dict[str, Any]]) -> str | None:
    """The Triton that comes with torch is the one that tests without a network take for it."""
    torch, triton = found["torch"]["version"], found.get("triton", {}).get("version")
    expected = TRITON_OF_TORCH.get(".".join(torch.split(".")[:2]))
    return None if triton in (None, expected) else f"torch {torch} brings triton {triton}, TRITON_OF_TORCH: {expected}"


def pins_are_met(found: dict[str, dict[str, Any]]) -> str | None:
    """Each package has the version that it is pinned to, and torch asks for no other."""
    for name, version in pins().items():
        if (got := found.get(name, {}).get("version", version)) != version:
            return f"{name} is pinned to {version}, and {got} would be installed"
    for requirement in map(Requirement, found["torch"]["requires_dist"]):
        pin = pins().get(canonicalize_name(requirement.name))
        if pin and not requirement.specifier.contains(pin):
            return f"torch {found['torch']['version']} requires {requirement}, and the pin is {pin}"
    return brought_by_torch(found)


def every_pin_is_used(found: dict[str, dict[str, Any]]) -> str | None:
    """A pin of a package that nothing asks for is a mistake."""
    idle = sorted(pins().keys() - found.keys())
    return f"nothing asks for {', '.join(idle)}" if idle else pins_are_met(found)


def run_case(python: Path, case: Case) -> tuple[bool, str]:
    """Whether a case passes, and its line."""
    if case.needs_torch and find_spec("torch") is None:
        return True, f"{'not run':<8} {case.title}: its setup imports torch, which this Python does not have"
    # What compiles on a machine with CUDA tells its requirements without it.
    variables = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"} if case.needs_torch else {}
    try:
        metadata = plain_pip.resolve(python, case.arguments, variables)
    except plain_pip.ResolutionError as error:
        return False, f"{'FAILED':<8} {case.title}\n{textwrap.indent(str(error), '    ')}"
    found = {canonicalize_name(entry["name"]): entry for entry in metadata}
    if wrong := case.check(found):
        return False, f"{'FAILED':<8} {case.title}: {wrong}"
    shown = ", ".join(f"{name} {found[name]['version']}" for name in SHOWN if name in found)
    note = "; that its kernels compile is not checked" if case.needs_torch else ""
    return True, f"{'ok':<8} {case.title:<38} {len(found):>3} packages: {shown}{note}"


def main() -> int:
    """Run all cases and return the exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = plain_pip.create(folder / "venv", *plain_pip.BUILD_TOOLS)
        wheel = plain_pip.build_wheel(python, ROOT, folder)
        # Behind its own packages, the environment sees this Python's torch.
        seen = Path(plain_pip.site_packages(python)) / "seen.pth"
        seen.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        print(f"Python {sys.version.split()[0]}, plain PyPI", flush=True)
        passed = True
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for good, line in pool.map(lambda case: run_case(python, case), list(cases(wheel, folder))):
                passed &= good
                print(line, flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
