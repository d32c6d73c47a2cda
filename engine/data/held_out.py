"""Whether evaluation rows are held out: rows and prompts that the training data has, too, and a split by prompts."""

from __future__ import annotations

import json
from array import array
from hashlib import blake2b
from typing import Any

import numpy as np

from .copies import SeenKeys, digest, key_of
from .examples import Example
from .groups import PreferenceGroup
from .sets import Report

TRAINED = ("trained_row", "trained_prompt")
"""Their names in ``PROBLEMS``."""


class HeldOut:
    """Finds evaluation rows that are trained on, by their tokens, whichever answer is the chosen one.

    Memory: 16 to 32 bytes a training row, 32 an evaluation row.
    """

    def __init__(self) -> None:
        self._trained = SeenKeys(), SeenKeys()
        self._begin()

    def _begin(self) -> None:
        """Nothing is evaluated yet."""
        self._rows: array[int] = array("q")
        self._sources: array[int] = array("h")
        self._names: dict[str, int] = {}
        self._keys = array("Q"), array("Q")

    def trains(self, group: PreferenceGroup) -> None:
        """Note a group of the training data."""
        for seen, key in zip(self._trained, _keys(group), strict=True):
            seen.recent.add(key)
            seen.settle()

    def evaluates(self, group: PreferenceGroup) -> None:
        """Note a group of the evaluation data."""
        self._rows.append(group.row)
        self._sources.append(self._names.setdefault(group.source, len(self._names)))
        for keys, key in zip(self._keys, _keys(group), strict=True):
            keys.append(key)

    def report(self, report: Report) -> int:
        """Note in the report of the evaluation data which of its rows, or else prompts, are trained on; the next
        rows that are evaluated are another set.

        Returns:
            How many rows are.
        """
        of_row, of_prompt = (
            seen.settled(np.array(keys, np.uint64)) | np.array([key in seen.recent for key in keys], bool)
            for seen, keys in zip(self._trained, self._keys, strict=True)
        )
        names = list(self._names)
        for source, row, whole, prompt in zip(self._sources, self._rows, of_row, of_prompt, strict=True):
            if whole or prompt:
                report.of(names[source]).add(TRAINED[0] if whole else TRAINED[1], row)
        self._begin()
        return int((of_row | of_prompt).sum())


def _keys(group: PreferenceGroup) -> tuple[int, int]:
    prompt = digest(group.prompt_ids.tobytes())
    # Behind the response of an unpaired row there may be another row's.
    own = group.response_ids if group.desirable is None else group.response_ids[:1]
    return key_of(prompt, *sorted(digest(ids.tobytes()) for ids in own)), key_of(prompt)


def is_held_out(example: Example, fraction: float) -> bool:
    """Whether a row belongs to the ``fraction`` of prompts that is evaluated: by the content of its prompt alone, so
    that no prompt is on both sides, whatever the order of the rows."""
    text = json.dumps(_asked(example), ensure_ascii=False, sort_keys=True, default=str)
    number = int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return number < fraction * 2**64


def _asked(example: Example) -> Any:
    return example.prompt.strip() if isinstance(example.prompt, str) else example.prompt
