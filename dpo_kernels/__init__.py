"""Fast, exact preference-loss ops: from hidden states to a DPO loss without the logits matrix."""

from dpo_kernels.description import describe
from dpo_kernels.kto import KTOLoss, LinearKTOLoss, kto_divergence, kto_loss, linear_kto_loss
from dpo_kernels.linear_dpo.api import LinearDPOLoss, LinearDPOLossStats, linear_dpo_loss
from dpo_kernels.linear_logps.api import TokenLogps, linear_logps
from dpo_kernels.linear_logps.vocab_parallel import linear_logps_vocab_parallel
from dpo_kernels.losses import LOSS_TYPES
from dpo_kernels.native import warn_if_stale
from dpo_kernels.preference import (
    PlackettLuceLoss,
    PreferenceLoss,
    ld_token_weights,
    plackett_luce_loss,
    preference_loss,
)

__all__ = [
    "LOSS_TYPES",
    "KTOLoss",
    "LinearDPOLoss",
    "LinearDPOLossStats",
    "LinearKTOLoss",
    "PlackettLuceLoss",
    "PreferenceLoss",
    "TokenLogps",
    "describe",
    "kto_divergence",
    "kto_loss",
    "ld_token_weights",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_logps",
    "linear_logps_vocab_parallel",
    "plackett_luce_loss",
    "preference_loss",
]

warn_if_stale()
