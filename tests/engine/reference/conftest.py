"""A small deterministic policy that counts its forwards, and datasets of random tokens."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine.data.groups import PreferenceDataset, PreferenceGroup
from engine.model.policy import Layout

VOCAB = 50


class BigramPolicy(nn.Module):
    """Log-probs of a bigram table: what a policy must offer to be scored, without a transformer."""

    has_adapter = False
    reference_adapter = None

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, backend: str = "sdpa"):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Embedding(VOCAB, VOCAB)
        with torch.no_grad():
            self.model.weight.normal_(generator=generator)
        self.config = SimpleNamespace(to_dict=lambda: {"model_type": "bigram", "vocab_size": VOCAB})
        self.compute_dtype = dtype
        self.backend = SimpleNamespace(name=backend)
        self.device = torch.device("cpu")
        self.layout = Layout()
        self.scored: list[tuple[int, ...]] = []
        self.modes: list[tuple[bool, bool, bool]] = []
        self._in_reference = False

    @property
    def causal_lm(self) -> nn.Module:
        return self.model

    def logps(self, batch) -> torch.Tensor:
        self.scored.append(batch.rows)
        self.modes.append((self._in_reference, self.training, torch.is_grad_enabled()))
        previous = batch.input_ids_T[batch.rows_N]
        return self.model(previous).log_softmax(-1).gather(-1, batch.labels_N[:, None])[:, 0]

    @contextmanager
    def reference_mode(self):
        self._in_reference = True
        try:
            yield
        finally:
            self._in_reference = False

    def expected(self, group: PreferenceGroup) -> list[np.ndarray]:
        table = self.model.weight.detach().log_softmax(-1).numpy()
        rows = [np.concatenate([group.prompt_ids[-1:], r]) for r in group.response_ids]
        return [table[row[:-1], row[1:]] for row in rows]


def random_groups(count: int, *, seed: int = 0, responses: int = 2) -> list[PreferenceGroup]:
    rng = np.random.default_rng(seed)

    def ids(most: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(1, most), dtype=np.int32)

    return [PreferenceGroup(row, ids(20), tuple(ids(15) for _ in range(responses))) for row in range(count)]


@pytest.fixture
def policy() -> BigramPolicy:
    return BigramPolicy()


@pytest.fixture
def make_policy():
    return BigramPolicy


@pytest.fixture
def make_groups():
    return random_groups


@pytest.fixture
def dataset() -> PreferenceDataset:
    return PreferenceDataset(random_groups(40))
