"""How large a demo is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Shape of the starting model and how long it is trained."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    steps: int = 300
    batch: int = 32
    learning_rate: float = 3e-3


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """What is generated and trained."""

    dialogues: int = 8000
    model: ModelSize = field(default_factory=ModelSize)
    pairs: int = 1024
    held_out: int = 256
    pairs_per_step: int = 16
    learning_rate: float = 1.2e-4
    """Of the preference training: a hundred times the usual one, for a model ten thousand times smaller."""
    warmup_steps: int = 4
    logging_steps: int = 2
    eval_steps: int = 16
    samples: int = 64
    """Held-out prompts that both models answer."""
