"""Whether a model can read the rows of some data, alike in any pack: their tokens and their lengths."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..data.groups import PreferenceDataset
from ..errors import UserError
from .layers import text_model
from .policy import Policy

# Names of learned or tabulated absolute positions.
_POSITIONS = re.compile(r"wpe|embed_positions|pos(ition)?s?_emb(ed|edding|eddings)?")


def check_dataset(policy: Policy, dataset: PreferenceDataset) -> None:
    """Raise a ``UserError`` that names the first row that the model cannot read, or cannot read alike in a pack."""
    name = type(policy.causal_lm).__name__
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if dataset.largest_id >= size:
        for group in dataset:
            largest = max(int(ids.max()) for ids in (group.prompt_ids, *group.response_ids))
            if largest >= size:
                raise UserError(
                    f"row {group.label}: token {largest} is outside the {size:,} embeddings of {name}: the "
                    "tokenizer has more tokens than the model; use the model's own tokenizer, or resize its embeddings"
                )
    limit, reason = _length_limit(policy)
    if limit is None:
        return
    for group, lengths in zip(dataset, dataset.lengths, strict=True):
        longest = int(lengths[0] + lengths[1:].max())
        if longest > limit:
            raise UserError(
                f"row {group.label}: prompt and response have {longest:,} tokens, and {name} {reason}; "
                f"set data.max_length to {limit} or less"
            )


def _length_limit(policy: Policy) -> tuple[int | None, str]:
    """The longest sequence that gives in any pack what it gives alone, and what happens beyond."""
    config: Any = policy.config.get_text_config()
    limits: list[tuple[int, str]] = []
    # A vision tower has a table, too, of the patches of its images.
    for name, module in text_model(policy.causal_lm).named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name.rpartition(".")[2]):
            size = min(module.num_embeddings, getattr(config, "max_position_embeddings", module.num_embeddings))
            limits.append((size, f"has {size:,} positions"))
    rope = getattr(config, "rope_parameters", None) or {}
    for section in (rope, *rope.values()):
        if isinstance(section, dict) and section.get("rope_type") in ("longrope", "dynamic"):
            size = section.get("original_max_position_embeddings") or config.max_position_embeddings
            kind = section["rope_type"]
            limits.append((size, f"scales all positions by the longest sequence of a pack beyond {size:,} ({kind})"))
    return min(limits, default=(None, ""))
