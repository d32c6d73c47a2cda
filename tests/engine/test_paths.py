from __future__ import annotations

import pwd
from pathlib import Path

import pytest

import engine
from engine.errors import UserError
from engine.paths import expanded
from engine.reference import ReferenceStore, default_store_path

ENGINE = Path(engine.__file__).parent


@pytest.fixture
def homeless(monkeypatch):
    """A user whose id is in no list, as in a container that is run by a number."""
    for name in ("HOME", "XDG_CACHE_HOME", "DPO_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_is_told_what_to_set(homeless, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no home folder for its default: set reference\.store, or .* DPO_CACHE"):
        default_store_path()
    with pytest.raises(UserError, match=r"^~/store: this user has no home folder that ~ could stand for"):
        ReferenceStore("~/store")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    assert default_store_path() == tmp_path / "reference"
    assert expanded("plain/path") == Path("plain/path")


def test_paths_of_users_are_expanded_in_one_place():
    found = [
        path.relative_to(ENGINE).as_posix() for path in ENGINE.rglob("*.py") if ".expanduser()" in path.read_text()
    ]
    assert found == ["paths.py"]
