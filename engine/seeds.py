"""The generators of random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed those of Python, numpy and torch, on every device, as the Trainer does before a run.

    transformers' own function for it would bring the Trainer's parts and peft, which take more than a second to import.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
