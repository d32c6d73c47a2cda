from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.kills.harness import Harness, Parent


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """Moments come from a fixed seed, as far as a clock can be seeded."""
    with Parent() as parent:
        yield Harness(parent, tmp_path_factory.mktemp("kills"), seed=12)
