"""Whether a model can learn from its data where to stop: completions must end with a token that ends a generation."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..config.schema import ModelConfig
from ..data.groups import PreferenceDataset, PreferenceGroup
from ..data.sets import Report
from ..data.tokenize import special_ids
from .sources import MODEL_CONFIG, config_file

OTHER_END = "other_end"
"""Its name in ``PROBLEMS``."""
_GENERATION_CONFIG = "generation_config.json"


def stop_ids(model: ModelConfig, tokenizer: Any) -> frozenset[int]:
    """Tokens at which generation with the trained model stops: the tokenizer's EOS, and those of the model's
    generation config."""
    generation = config_file(model, _GENERATION_CONFIG) or config_file(model, MODEL_CONFIG)
    own = generation.get("eos_token_id")
    listed = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return frozenset(token for token in listed if isinstance(token, int))


class LearnedStops:
    """Looks at how completions end. Those that are cut at ``max_length`` say nothing.

    Args:
        max_length: ``data.max_length``.
    """

    def __init__(self, model: ModelConfig, tokenizer: Any, max_length: int | None):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._specials = special_ids(tokenizer)
        self.stops = stop_ids(model, tokenizer)
        self._learned = False
        self._others: Counter[int | None] = Counter()

    def note(self, group: PreferenceGroup) -> bool:
        """Note the completions of a group; whether one ends with a special token that stops nothing."""
        found = False
        for ids in group.response_ids:
            # Some templates write a line break behind it.
            ends = [int(token) for token in ids[:-3:-1]]
            if not self.stops.isdisjoint(ends):
                self._learned = True
            elif self._max_length is None or len(group.prompt_ids) + len(ids) < self._max_length:
                end = next((token for token in ends if token in self._specials), None)
                self._others[end] += 1
                found = found or end is not None
        return found

    def look_at(self, dataset: PreferenceDataset, report: Report) -> None:
        """Note all groups of a dataset, and in its report those that end otherwise."""
        others = dataset.ending_without(self.stops)
        self._learned = self._learned or len(others) < len(dataset)
        for place in others.tolist():
            group = dataset[place]
            if self.note(group):
                report.of(group.source).add(OTHER_END, group.row)

    def words(self) -> str | None:
        """What to say where no completion teaches the model to stop; None where one does, or all are cut."""
        if self._learned or not self._others:
            return None
        stops = " and ".join(repr(self._tokenizer.decode([token])) for token in sorted(self.stops)) or "nothing"
        ends = [f"with {self._tokenizer.decode([t])!r}" for t, _ in self._others.most_common() if t is not None]
        ends += ["without a special token"] if None in self._others else []
        return (
            f"no completion teaches the model to stop: generation ends at {stops}, and completions end "
            f"{' or '.join(ends[:3])}; make that token the tokenizer's eos_token, or use a chat template that ends "
            "turns with it"
        )
