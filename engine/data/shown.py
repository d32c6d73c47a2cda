"""A row of data in words, as the model reads it, for ``dpo check``.

Shape suffix: R tokens of one response.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .groups import PreferenceGroup

PROMPT_TOKENS = 48
RESPONSE_TOKENS = 32
PAIRS = 8
"""So much of a row is shown."""


def is_marked(group: PreferenceGroup) -> bool:
    """Whether tokens of the row count differently."""
    return any((weights != 1).any() for weights in group.token_weights or ())


def response_names(group: PreferenceGroup) -> tuple[str, ...]:
    """What the responses of a row are called, best first."""
    count = len(group.response_ids)
    if group.desirable is not None:
        return ("desirable" if group.desirable else "undesirable",)
    if count == 2:
        return ("chosen", "rejected")
    # Scores may tie, so only their pairs say which response is the better one.
    names = tuple(f"{'rank' if group.pairs is None else 'response'} {i}" for i in range(1, count + 1))
    return names if group.pairs is not None else (f"{names[0]}, best", *names[1:])


def format_example(group: PreferenceGroup, tokenizer) -> str:
    """The end of the prompt and the start and end of each response, best first, as the model reads them."""
    lines = [f"row {group.label} as the model reads it"]
    names = response_names(group)
    width = max(len(name) for name in ("prompt", *names))
    tail = group.prompt_ids[-PROMPT_TOKENS:]
    skipped = "... " if len(tail) < len(group.prompt_ids) else ""
    lines.append(f"  {'prompt':<{width}}  {skipped}{tokenizer.decode(tail)!r}")
    for place, (name, ids) in enumerate(zip(names, group.response_ids, strict=True)):
        weights_R = np.ones(len(ids)) if group.token_weights is None else group.token_weights[place]
        half = RESPONSE_TOKENS // 2
        parts = [slice(None)] if len(ids) <= RESPONSE_TOKENS else [slice(None, half), slice(-half, None)]
        shown = " ... ".join(_marked(ids[part], weights_R[part], tokenizer) for part in parts)
        lines.append(f"  {name:<{width}}  {shown}")
    if is_marked(group):
        lines.append(f"  {'':<{width}}  [0: ...] is tokens that count nothing, [w: ...] those of weight w")
    if group.pairs is not None:
        listed = ", ".join(f"{a + 1} over {b + 1}" for a, b in group.pairs[:PAIRS])
        more = ", ..." if len(group.pairs) > PAIRS else ""
        lines.append(f"  {'pairs':<{width}}  {listed}{more}")
    return "\n".join(lines)


def _marked(ids: np.ndarray, weights_R: np.ndarray, tokenizer) -> str:
    """The text of tokens, in parts where their weights differ."""
    cuts = [0, *(np.flatnonzero(np.diff(weights_R)) + 1).tolist(), len(ids)]
    parts = []
    for start, end in pairwise(cuts):
        text = repr(tokenizer.decode(ids[start:end]))
        parts.append(text if (weights_R[start:end] == 1).all() else f"[{weights_R[start]:g}: {text}]")
    return " ".join(parts)
