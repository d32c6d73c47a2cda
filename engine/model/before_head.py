"""What the head of a model would be given by the model's own forward, without the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .head import read_head


class _BeforeHead(nn.Module):
    """Stands where the head was: keeps what it is given, [..., D], and gives one row of small equal numbers."""

    VALUE = 2.0**-12
    weight: torch.Tensor

    def __init__(self, weight_VD: torch.Tensor):
        super().__init__()
        # Not a parameter here; some models ask for its dtype.
        self.__dict__["weight"] = weight_VD
        self._hidden: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._hidden = hidden
        shape = (*hidden.shape[:-2], 1, len(self.weight))
        return torch.full(shape, self.VALUE, dtype=torch.float32, device=hidden.device)

    @property
    def hidden(self) -> torch.Tensor:
        if self._hidden is None:
            raise UserError("the output layer is not called by the model")
        return self._hidden

    def scale(self, logits: torch.Tensor) -> float:
        """The factor that a model gives its logits behind the head: others come before it. Waits for the device."""
        scale = logits.double().mean().item() / self.VALUE
        return 1.0 if abs(scale - 1) < 1e-6 else scale


@contextmanager
def taken_before_head(model: nn.Module) -> Iterator[_BeforeHead]:
    """While it is entered, a forward of the model ends before its head and leaves what the head would be given."""
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    stand_in = _BeforeHead(read_head(model).weight_VD)
    places = [(m, name) for m in model.modules() for name, child in m._modules.items() if child is layer]
    for parent, name in places:
        parent._modules[name] = stand_in
    try:
        yield stand_in
    finally:
        for parent, name in places:
            parent._modules[name] = layer
