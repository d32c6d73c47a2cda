"""A store that is not used says why: what it holds was computed in another way, or by another version."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from engine.reference import ReferenceStore, identify, precompute
from engine.reference.provenance import PROFILE_FILE, why_absent


@pytest.fixture
def store(tmp_path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "store")


def fill(policy, dataset, store):
    return precompute(policy, dataset, store, tokens_per_pack=128, progress=False)


def test_what_changed_is_said_once_and_the_rows_are_computed_again(policy, dataset, store, monkeypatch, caplog):
    fill(policy, dataset, store)
    monkeypatch.setattr("engine.reference.keys._minor_version", lambda package: "9.9")
    versions = identify(policy).profile
    assert versions["torch"] == versions["transformers"] == "9.9"
    with caplog.at_level(logging.INFO, logger="engine"):
        report = fill(policy, dataset, store)
        again = fill(policy, dataset, store)
    assert (report.computed_rows, again.computed_rows) == (len(dataset), 0)
    (line,) = [record.message for record in caplog.records if "are not used" in record.message]
    assert f"{store.path} has log-probs of these weights from torch " in line
    assert "(now 9.9), transformers " in line


def test_a_store_of_the_first_schema_is_not_found_and_named(policy, dataset, store):
    identity = identify(policy)
    assert identity.first_digest != identity.digest
    assert why_absent(store, identity) is None
    store.add({bytes.fromhex(identity.first_digest[:8]) + bytes(12): np.ones(3, np.float32)})
    assert "from an earlier version, whose keys did not name libraries and device" in why_absent(store, identity)
    assert fill(policy, dataset, store).computed_rows == len(dataset)
    assert why_absent(store, identity) is None


def test_other_weights_are_no_reason(policy, make_policy, dataset, store):
    fill(policy, dataset, store)
    assert why_absent(store, identify(make_policy(seed=1))) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"weights": 1}', b"\xff"])
def test_a_profile_that_is_damaged_is_no_reason(content, policy, make_policy, dataset, store, monkeypatch):
    fill(policy, dataset, store)
    (path,) = store.path.glob(f"*/{PROFILE_FILE}")
    path.write_bytes(content)
    monkeypatch.setattr("engine.reference.keys._minor_version", lambda package: "9.9")
    assert why_absent(store, identify(policy)) is None
    assert fill(policy, dataset, store).computed_rows == len(dataset)
