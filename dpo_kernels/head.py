"""The linear head that an op runs under, as one record, and the gradients that come back through it.

Legend: T rows (tokens), D features, V vocabulary, B blocks of rows, C column tiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor


class HeadOptions(TypedDict, total=False):
    """What ``linear_logps`` and ``linear_dpo_loss`` take of a head by keyword."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float


class Head(NamedTuple):
    """A linear head, and what turns its output a = x W^T + b into logits z.

    z = softcap * tanh(logit_scale * a / softcap) / temperature, in that order; without a softcap
    z = logit_scale * a / temperature.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    @property
    def options(self) -> HeadOptions:
        """All but the weight, as keywords of the public functions."""
        return {
            "bias": self.bias_V,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
        }

    @property
    def slope(self) -> float:
        """dz / da, but for the softcap's own factor."""
        return self.logit_scale / self.temperature

    @property
    def trainable(self) -> bool:
        """Whether weight or bias require a gradient."""
        return self.weight_VD.requires_grad or (self.bias_V is not None and self.bias_V.requires_grad)

    def columns(self, columns: slice) -> Head:
        """The same head for a slice of the vocabulary."""
        bias_V = None if self.bias_V is None else self.bias_V[columns]
        return self._replace(weight_VD=self.weight_VD[columns], bias_V=bias_V)

    def autocast(self, hidden: Tensor) -> tuple[Tensor, Head]:
        """Hidden states and head as autocast casts the inputs of a matrix product; float64 is left alone, as there."""
        device_type = hidden.device.type
        if not torch.is_autocast_enabled(device_type) or torch.float64 in (hidden.dtype, self.weight_VD.dtype):
            return hidden, self
        dtype = torch.get_autocast_dtype(device_type)
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return hidden.to(dtype), self._replace(weight_VD=self.weight_VD.to(dtype), bias_V=bias_V)

    def check(self, hidden_TD: Tensor, labels_T: Tensor) -> None:
        """Raise ValueError, with what was expected and what came, for inputs that no implementation can take."""
        weight_VD, bias_V = self.weight_VD, self.bias_V
        if hidden_TD.ndim != 2 or hidden_TD.shape[1] < 1:
            raise ValueError(f"hidden must have shape [tokens, features >= 1]; got {list(hidden_TD.shape)}")
        T, D = hidden_TD.shape
        if weight_VD.ndim != 2 or weight_VD.shape[1] != D or weight_VD.shape[0] < 1:
            raise ValueError(f"weight must have shape [vocabulary, {D}], like hidden; got {list(weight_VD.shape)}")
        V = weight_VD.shape[0]
        if labels_T.ndim != 1 or labels_T.shape[0] != T:
            raise ValueError(f"labels must have shape [{T}], one per row of hidden; got {list(labels_T.shape)}")
        if labels_T.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"labels must be int64 or int32; got {labels_T.dtype}")
        if bias_V is not None and (bias_V.ndim != 1 or bias_V.shape[0] != V):
            raise ValueError(f"bias must have shape [{V}], one per row of weight; got {list(bias_V.shape)}")
        dtype, device = hidden_TD.dtype, hidden_TD.device
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"hidden must be bfloat16, float16, float32 or float64; got {dtype}")
        for name, tensor in (("weight", weight_VD), ("bias", bias_V)):
            if tensor is not None and tensor.dtype != dtype:
                raise ValueError(
                    f"{name} must have the dtype of hidden, {dtype}; got {tensor.dtype} (cast, or use autocast)"
                )
        for name, tensor in (("weight", weight_VD), ("labels", labels_T), ("bias", bias_V)):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name} must be on the device of hidden, {device}; got {tensor.device}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, or None; got {self.softcap}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}")
        if not -math.inf < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale must be finite; got {self.logit_scale}")


class Kept(NamedTuple):
    """The tiles of the logits gradient that a filtered backward forms."""

    order_T: Tensor
    """int64: the row of the inputs that stands at each place; a block is R consecutive places."""
    kept_BC: Tensor
    """bool."""


class Needs(NamedTuple):
    """Which gradients are needed. The last two are for the backward of ``linear_logps`` alone."""

    hidden: bool
    weight: bool
    bias: bool
    weight_grad_VD: Tensor | None = None
    """float32 (float64), of any strides: the gradient of the weight is added to it, unrounded, and not returned."""
    tiles: Kept | None = None
    """The gradient of the logits is taken as 0 in all other tiles, and no product of them is formed."""


class Gradients(NamedTuple):
    """Of hidden states, weight and bias; None for what is not needed."""

    dX_TD: Tensor | None
    dW_VD: Tensor | None
    db_V: Tensor | None
