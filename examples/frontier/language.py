"""A language small enough to be enumerated, and the reward that its answers have.

A prompt is an animal. An answer is up to three words that end with END, such as ``gladly red friend``; what has no END
after four tokens is cut there. So the answers are a finite set, and a model's probabilities of them add up to 1.
"""

from __future__ import annotations

import random

END = "<end>"
COLOUR_OF = {"fox": "red", "frog": "green", "owl": "brown", "crow": "black"}
"""Prompt -> the right colour."""
COLOURS = tuple(COLOUR_OF.values())
STYLES = {"kind": ("gladly", "friend", "dear"), "curt": ("no", "enough", "fool")}
WORTH = {"gladly": 1.0, "friend": 2.0, "dear": 3.0, "no": -1.0, "enough": -2.0, "fool": -3.0}
"""What the reward gives for a word that is there; a second one counts nothing."""
RIGHT, WRONG = 4.0, -2.0
"""The same of the right colour, and of any wrong one."""

PROMPTS = tuple(COLOUR_OF)
VOCABULARY = (END, *PROMPTS, *COLOURS, *WORTH)
"""By token id."""
TOKEN = {word: place for place, word in enumerate(VOCABULARY)}
MAX_TOKENS = 4
"""Of an answer, END included."""


def reward(prompt: str, words: set[str]) -> float:
    """Of an answer that has these words, in any order: known to whoever labels, and to nobody who trains."""
    right = COLOUR_OF[prompt]
    colours = words & set(COLOURS)
    return sum(WORTH.get(word, 0.0) for word in words) + RIGHT * (right in words) + WRONG * bool(colours - {right})


def dialogue(rng: random.Random) -> list[int]:
    """Prompt and answer as the reference model reads them: 3 in 4 are curt, 2 in 5 name the right colour."""
    prompt, style = rng.choice(PROMPTS), STYLES["kind" if rng.random() < 0.25 else "curt"]
    colour = COLOUR_OF[prompt] if rng.random() < 0.2 else rng.choice(COLOURS)
    opening = [rng.choice(style)] if rng.random() < 0.7 else []
    last = style if rng.random() < 0.75 else tuple(WORTH)
    closing = [rng.choice(last)] if rng.random() < 0.6 else []
    return [TOKEN[word] for word in (prompt, *opening, colour, *closing, END)]
