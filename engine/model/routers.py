"""How a mixture of experts spreads its tokens, summed over packs, and the load-balancing loss of these sums.

The loss is that of the Switch Transformer as transformers and TRL compute it: over all routers together, the number of
experts times the sum over experts of (share of tokens that chose it) x (its mean probability). Only the second factor
has a gradient. A packed token counts once for every response that it is read by, so a shared prompt counts as the
copies of it in an unpacked batch would; padding is not there.

Legend: T packed tokens, E experts, L routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.hf_config import EXPERT_CHOICES

from ..errors import UserError

_FLAG = "output_router_logits"


class RouterSums(NamedTuple):
    """Over the tokens of some packs, each counted once per response."""

    chosen_LE: Tensor
    """How often each expert is among the most probable ones; detached."""
    probs_E: Tensor
    """Sum of router probabilities over tokens and routers. Alone has gradients."""
    tokens: Tensor
    """How many there are, times routers; a scalar."""

    def detach(self) -> RouterSums:
        return self._replace(probs_E=self.probs_E.detach())

    def scaled(self, factor: float) -> RouterSums:
        return RouterSums(*(values * factor for values in self))

    def plus(self, other: RouterSums) -> RouterSums:
        return RouterSums(*(a + b for a, b in zip(self, other, strict=True)))


def balance_loss(total: RouterSums, probs_E: Tensor) -> Tensor:
    """The part of tokens with summed probabilities ``probs_E`` in the loss of all tokens of ``total``, unscaled.

    The parts of packs add up to the loss of the step, whatever packs it is divided into.
    """
    chosen_E = total.chosen_LE.sum(0)
    return len(probs_E) * (chosen_E / total.tokens * (probs_E / total.tokens)).sum()


def router_arguments(config: Any, wanted: bool) -> dict[str, bool]:
    """What a model's body is called with so that it returns the logits of its routers, or does not keep them."""
    return {_FLAG: wanted} if hasattr(config.get_text_config(), _FLAG) else {}


def sum_routers(logits: Sequence[Tensor] | None, repeats_T: Tensor, top_k: int) -> RouterSums:
    """Sums over the tokens of a pack.

    Args:
        logits: of each router, [..., E] over all packed tokens.
        repeats_T: int64, how many responses read each of them.
        top_k: experts that a token goes to.

    Raises:
        UserError: the model did not return any.
    """
    if not logits:
        raise UserError(
            "the model does not return the logits of its routers, which its load-balancing loss is made of: set "
            "loss.router_aux_loss_coef to 0"
        )
    with torch.autocast(repeats_T.device.type, enabled=False):
        chosen_LE, probs_LE = [], []
        for layer in logits:
            rows_TE = layer.reshape(len(repeats_T), -1)
            probs_TE = rows_TE.to(torch.promote_types(rows_TE.dtype, torch.float32)).softmax(-1)
            weights_T1 = repeats_T.to(probs_TE.dtype)[:, None]
            # A token chooses an expert once, so that no two writes meet in one place.
            chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.detach().topk(top_k, -1).indices, 1.0)
            chosen_LE.append((chosen_TE * weights_T1).sum(0))
            probs_LE.append((probs_TE * weights_T1).sum(0))
        tokens = repeats_T.sum().to(probs_LE[0].dtype) * len(logits)
        return RouterSums(torch.stack(chosen_LE), torch.stack(probs_LE).sum(0), tokens)


def experts_per_token(text: Any) -> int | None:
    """How many experts a token goes to, by the config of the text model or one inside it."""
    parts = [text, *(getattr(text, name, None) for name in text.sub_configs)]
    return next((int(k) for part in parts for name in EXPERT_CHOICES if (k := getattr(part, name, None))), None)
