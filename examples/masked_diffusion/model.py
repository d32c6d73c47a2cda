"""A masked-diffusion language model: a small transformer that sees both ways and says what the masked tokens were.

Legend: B sequences, T tokens of a sequence, D features, V vocabulary, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model."""

    features: int = 96
    layers: int = 3
    heads: int = 4


class Block(nn.Module):
    """Attention to all tokens that are no padding, and a perceptron, each on normed input and added to it."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2))
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x_BTD: Tensor, visible_B11T: Tensor) -> Tensor:
        attend, think = self.norms
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(attend(x_BTD)).chunk(3, dim=-1)
        )
        mixed_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_B11T)
        x_BTD = x_BTD + self.out(mixed_BHTd.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp(think(x_BTD))


class MaskedModel(nn.Module):
    """Token ids in, hidden states out; the head is a matrix for ``linear_logps``, so that no logits are made here.

    There is one more embedding than the vocabulary has tokens: the mask, which can be read and never predicted.

    Args:
        vocabulary: V, tokens that can be predicted.
        length: most tokens of a sequence.
        pad: id of the padding, which nothing attends to.
    """

    def __init__(self, vocabulary: int, length: int, pad: int, shape: Shape):
        super().__init__()
        self.mask, self.pad = vocabulary, pad
        self.tokens = nn.Embedding(vocabulary + 1, shape.features)
        self.places = nn.Embedding(length, shape.features)
        self.blocks = nn.ModuleList(Block(shape.features, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.features)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=shape.features**-0.5)

    @property
    def head(self) -> Tensor:
        """[V, D]: the embeddings of the tokens that can be predicted, which are the head as well."""
        return self.tokens.weight[: self.mask]

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] of token ids [B, T], each of which knows all tokens beside it."""
        x_BTD = self.tokens(ids_BT) + self.places.weight[: ids_BT.shape[1]]
        visible_B11T = (ids_BT != self.pad)[:, None, None]
        for block in self.blocks:
            x_BTD = block(x_BTD, visible_B11T)
        return self.norm(x_BTD)

    @torch.no_grad()
    def answer(self, prompts_BP: Tensor, window: int, generator: torch.Generator) -> Tensor:
        """Responses [B, R] drawn by iterative unmasking: every step fills one masked place of each, in random order.

        This draws exactly from the distribution whose log-probs the ELBO bounds; to fill several places at once is
        faster, and draws them as if they were independent.
        """
        ids_BR = torch.full((len(prompts_BP), window), self.mask)
        order_BR = torch.rand(ids_BR.shape, generator=generator).argsort(1)
        rows_B = torch.arange(len(ids_BR))
        for place_B in order_BR.unbind(1):
            hidden_BTD = self(torch.cat([prompts_BP, ids_BR], dim=1))
            # One token of each response: [B, V], whatever the length.
            logits_BV = hidden_BTD[rows_B, prompts_BP.shape[1] + place_B] @ self.head.T
            ids_BR[rows_B, place_B] = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
        return ids_BR
