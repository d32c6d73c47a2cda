"""Releases that an integration accepts, and what importing the package does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dpo_kernels.integrations import versions


@pytest.mark.parametrize("found", ["1.16.0", "1.16.3", "1.16.0.dev0"])
def test_accepts_the_series(monkeypatch, found):
    monkeypatch.setattr(versions, "installed_version", lambda name: found)
    versions.require_series("trl", "1.16", "here")


@pytest.mark.parametrize("found", ["1.1", "1.15.9", "1.160.0", "1.17.0", "2.16.0"])
def test_refuses_other_series(monkeypatch, found):
    monkeypatch.setattr(versions, "installed_version", lambda name: found)
    with pytest.raises(ImportError) as caught:
        versions.require_series("trl", "1.16", "here")
    assert str(caught.value) == f"here was tested with trl 1.16 only, got {found}: pip install 'trl>=1.16,<1.17'"


def test_absent():
    assert versions.installed_version("no-such-distribution") is None
    versions.require_series("no-such-distribution", "1.0", "here", optional=True)
    with pytest.raises(ImportError, match="which is not installed"):
        versions.require_series("no-such-distribution", "1.0", "here")


def test_package_imports_no_integration():
    code = (
        "import sys, dpo_kernels; "
        "print(*{m for m in sys.modules if m.split('.')[0] in ('trl', 'transformers', 'peft', 'liger_kernel')"
        " or m.startswith('dpo_kernels.integrations')})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
