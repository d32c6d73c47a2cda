from __future__ import annotations

import pytest

from engine.errors import counted


@pytest.mark.parametrize(("number", "words"), [(0, "0 packs"), (1, "1 pack"), (2, "2 packs"), (1234, "1,234 packs")])
def test_one_is_not_several(number, words):
    assert counted(number, "pack") == words
