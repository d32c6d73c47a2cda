"""What the head of a model would be given by the model's own forward, without the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UserError
from .head import output_layer


class HeadUse(NamedTuple):
    """What a model does with its head."""

    scale: float = 1.0
    """The factor that it gives its logits behind the head: others come before it."""
    stream: int = 0
    """Which of several streams, [B, S, L, D], its logits come from, where its head is given several."""


class _BeforeHead(nn.Module):
    """Stands where the head was: keeps what it is given, [B, L, D], and gives one row of small equal numbers.

    Of a model that has its head read several streams, [B, S, L, D], it marks each stream by its number in the
    vocabulary, by which the one is known that the model returns.
    """

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
        marks = torch.full(shape, self.VALUE, dtype=torch.float32, device=hidden.device)
        if hidden.ndim == 4:
            streams = torch.arange(hidden.shape[1], device=hidden.device)
            marks[:, streams, :, streams] *= 2
        return marks

    def hidden(self, use: HeadUse) -> torch.Tensor:
        """[B, L, D]: what the head was given for the logits that the model returned."""
        taken = self._taken()
        return taken[:, use.stream] if taken.ndim == 4 else taken

    def use(self, logits: torch.Tensor) -> HeadUse:
        """How the model came to these logits. Waits for the device."""
        taken = self._taken()
        scale = logits[..., -1].double().mean().item() / self.VALUE
        stream = int(logits[0, 0, : taken.shape[1]].argmax()) if taken.ndim == 4 else 0
        return HeadUse(1.0 if abs(scale - 1) < 1e-6 else scale, stream)

    def _taken(self) -> torch.Tensor:
        if self._hidden is None:
            raise UserError("the output layer is not called by the model")
        return self._hidden


@contextmanager
def taken_before_head(model: nn.Module) -> Iterator[_BeforeHead]:
    """While it is entered, a forward of the model ends before its head and leaves what the head would be given."""
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    stand_in = _BeforeHead(output_layer(model).weight)
    places = [(m, name) for m in model.modules() for name, child in m._modules.items() if child is layer]
    for parent, name in places:
        parent._modules[name] = stand_in
    try:
        yield stand_in
    finally:
        for parent, name in places:
            parent._modules[name] = layer
