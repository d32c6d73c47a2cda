from __future__ import annotations

import random

import numpy as np
import torch
from transformers import set_seed

from engine.seeds import seed_generators


def test_numbers_drawn_are_those_after_the_trainers_seed():
    drawn = []
    for seed in (set_seed, seed_generators):
        seed(7)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
