"""Pins and bounds that agree with each other and with torch, as far as that can be read without a network."""

from __future__ import annotations

import os
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.install import __main__ as check
from tests.install import plain_pip
from tests.install.declared import bounds, pins
from tests.install.versions import SETS, TRITON_OF_TORCH


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@pytest.mark.parametrize("name", pins())
def test_pin_is_within_its_bounds(name):
    assert bounds()[name].contains(pins()[name])


@pytest.mark.parametrize("name", SETS)
def test_triton_of_a_set_is_the_one_that_torch_brings(name):
    brought = TRITON_OF_TORCH[minor(SETS[name]["torch"])]
    assert SETS[name].get("triton", brought) == brought
    assert bounds()["triton"].contains(brought)


def test_installed_torch_allows_the_pins():
    for requirement in map(Requirement, metadata.requires("torch") or []):
        pin = pins().get(canonicalize_name(requirement.name))
        if pin and minor(metadata.version("torch")) == minor(pins()["torch"]):
            assert requirement.specifier.contains(pin)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_bounds_are_what_was_tried(name):
    """The lower bound is the oldest set; the next minor release after the newest set is refused."""
    oldest, newest = SETS["oldest"][name], Version(SETS["newest"][name])
    lower = next(s.version for s in bounds()[name] if s.operator == ">=")
    assert minor(oldest) == minor(lower)
    assert bounds()[name].contains(newest)
    assert not bounds()[name].contains(f"{newest.major}.{newest.minor + 1}.0")


def found(**versions):
    requires = {"torch": ["filelock", "triton==3.7.1; platform_system == 'Linux'"]}
    return {n: {"version": v, "requires_dist": requires.get(n, [])} for n, v in versions.items()}


@pytest.mark.parametrize(
    ("versions", "triton_pin", "words"),
    [
        ({"triton": "3.7.1"}, "3.7.1", None),
        ({"triton": "3.7.1"}, "3.9.0", "triton is pinned to 3.9.0, and 3.7.1 would be installed"),
        ({}, "3.9.0", "torch 2.13.0 requires triton==3.7.1"),
        ({"triton": "3.8.0"}, "3.8.0", "torch 2.13.0 requires triton==3.7.1"),
    ],
)
def test_a_pin_that_torch_refuses_is_named(versions, triton_pin, words, monkeypatch):
    monkeypatch.setattr(check, "pins", lambda: {"torch": "2.13.0", "triton": triton_pin})
    wrong = check.pins_are_met(found(torch="2.13.0", **versions))
    assert wrong is None if words is None else wrong.startswith(words)


def test_a_pin_that_nothing_asks_for_is_named(monkeypatch):
    monkeypatch.setattr(check, "pins", lambda: {"torch": "2.13.0", "trl": "1.16.0"})
    assert check.every_pin_is_used(found(torch="2.13.0")) == "nothing asks for trl"


def test_a_failure_shows_the_words_of_the_resolver(monkeypatch, tmp_path):
    def resolve(*_):
        raise plain_pip.ResolutionError("ERROR: Cannot install\nERROR: ResolutionImpossible")

    monkeypatch.setattr(plain_pip, "resolve", resolve)
    good, line = check.run_case(tmp_path, check.Case(".[all]", [], check.brought_by_torch))
    assert not good
    assert line.splitlines()[1:] == ["    ERROR: Cannot install", "    ERROR: ResolutionImpossible"]


def test_pip_is_told_of_no_other_source(monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_NO_INDEX", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, "elsewhere")
    variables = plain_pip.environment()
    assert "elsewhere" not in {v for k, v in variables.items() if k.startswith("PIP_")}
    assert variables["PIP_CONFIG_FILE"] == os.devnull


def test_every_extra_is_resolved_with_and_without_constraints(tmp_path):
    titles = [case.title for case in check.cases(tmp_path / "dpo.whl", tmp_path)]
    for name in check.project()["optional-dependencies"]:
        assert f".[{name}]" in titles
        assert name == check.BUILT_ON_TORCH or f".[{name}]  -c constraints.txt" in titles
