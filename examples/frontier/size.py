"""How large the example is: the whole form, and one of seconds."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("dpo", "ipo", "simpo", "preferred-ft", "unlikelihood")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is generated and trained."""

    seed: int = 0
    max_tokens: int = 4
    """Where answers are cut."""
    hidden: int = 32
    reference_steps: int = 400
    prompts: int = 2400
    """Prompts that are answered four times each, with repetitions: the language has four."""
    held_out: int = 50
    """Further ones, for the engine's own evaluations."""
    fractions: tuple[float, ...] = (1 / 16, 1 / 4, 1.0)
    """Of the pairs, that DPO is trained on: how it nears the closed form. The other methods have all."""
    steps: int = 240
    pairs_per_step: int = 64
    learning_rate: float = 2e-3
    """A thousand times the usual one, for a model a hundred thousand times smaller."""
    evaluations: int = 6
    """Points of each run, at equal distances."""
    dpo_betas: tuple[float, ...] = (16.0, 8.0, 4.0, 2.0, 1.0)
    ipo_betas: tuple[float, ...] = (1.0, 0.5, 0.25, 0.12, 0.06)
    simpo_betas: tuple[float, ...] = (2.0,)
    simpo_rates: tuple[float, ...] = (1e-4, 3e-4, 2e-3)
    """Learning rates of SimPO, which has no reference to stay near: at that of the others it is far away at once."""
    alphas: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Weights of unlikelihood."""


QUICK = Size(
    max_tokens=3,
    hidden=16,
    reference_steps=60,
    prompts=24,
    held_out=4,
    fractions=(1.0,),
    steps=4,
    pairs_per_step=16,
    evaluations=2,
    dpo_betas=(1.0,),
    ipo_betas=(0.5,),
    simpo_betas=(2.0,),
    simpo_rates=(2e-3,),
    alphas=(0.5,),
)
