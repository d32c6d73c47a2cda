"""What the tests of every trainer's files share."""

from __future__ import annotations

from functools import partial

import pytest

from .recipes import convert, written


@pytest.fixture
def converted(tmp_path, request):
    """Converts a text under the name that the test's module has for it, ``FILE``."""
    return partial(convert, tmp_path / request.module.FILE)


@pytest.fixture
def run(tmp_path, converted):
    """The keys that a converted text sets."""
    return lambda text, **kwargs: written(converted(text, **kwargs), tmp_path)
