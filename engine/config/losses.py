"""The section ``loss`` of a run configuration, and what its losses read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .require import require as _require

LossType = Literal[
    "sigmoid", "hinge", "ipo", "ipo_sum", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "nll", "sigmoid_norm", "dpop", "dpo_shift", "simpo",
    "orpo", "cpo", "plackett_luce", "kto", "apo_zero_unpaired", "dpo", "dpo_norm",
]  # fmt: skip
LOSS_ALIASES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}
"""Names that others give losses."""
REFERENCE_FREE_LOSSES = frozenset({"sft", "nll", "simpo", "orpo", "cpo"})
"""Losses whose value does not depend on reference log-probs."""
UNPAIRED_LOSSES = frozenset({"kto", "apo_zero_unpaired"})
"""Losses of single responses that are each desirable or not."""
SMOOTHED_LOSSES = frozenset(
    {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "dpop", "dpo_shift", "simpo", "cpo"}
)
"""Losses that read label_smoothing."""
LIKELIHOOD_LOSSES = frozenset({"sft", "nll", "orpo", "cpo"})
"""Losses with a term that is the likelihood of the chosen response."""
COUPLED_LOSSES = frozenset({"aot", "aot_unpaired"})
"""Losses of a step's pairs together: quantiles of it."""
DIVERGENCE_LOSSES = frozenset(
    {"sigmoid", "hinge", "ipo", "ipo_sum", "exo_pair", "robust", "discopop", "sft", "nll", "sigmoid_norm"}
)
"""Losses that take another f_divergence_type than reverse_kl."""


ALONE = UNPAIRED_LOSSES | {"plackett_luce"}
"""Losses that do not add to others, and have none of the options of pairs."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The preference loss. Names as in TRL; see ``dpo_kernels.losses`` for every type and its source."""

    loss_type: LossType | tuple[LossType, ...] = "sigmoid"
    """sigmoid, or dpo, is DPO; plackett_luce ranks two or more responses; simpo, orpo and cpo need no reference;
    kto and apo_zero_unpaired take rows that are each desirable or not. Several losses in a list are added."""
    loss_weights: tuple[float, ...] | None = None
    """Factor of each loss in a list; null is 1 for each."""
    beta: float = 0.1
    """Strength of the pull towards the reference model (the regularization tau for ipo)."""
    label_smoothing: float = 0.0
    """Probability that a preference label is wrong: conservative DPO for sigmoid, the papers' epsilon elsewhere."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""
    simpo_gamma: float = 0.5
    """Target reward margin of simpo."""
    cpo_alpha: float = 1.0
    """Weight of the likelihood term of cpo."""
    dpop_lambda: float = 50.0
    """How much dpop counts a chosen log-prob that falls below the reference."""
    shift_lambda: float = 0.95
    """What dpo_shift multiplies the rejected reward by, in (0, 1]."""
    desirable_weight: float = 1.0
    """What kto and apo_zero_unpaired multiply the loss of desirable rows by."""
    undesirable_weight: float = 1.0
    """The same of undesirable rows."""
    rpo_alpha: float | None = None
    """Add so much of the mean token loss of each chosen response (the loss nll); null adds nothing."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence between policy and reference (f-DPO); other ones are for losses of the reward difference."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence; at 1 it is reverse_kl."""
    ld_alpha: float | None = None
    """Weight of the tokens by which the longer response of a pair exceeds the shorter one (LD-DPO); null is 1."""
    use_weighting: bool = False
    """Weigh each pair by how probable its responses are under the policy (WPO); one more product of the head."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts; null is the model's own, 0 leaves it out. Without it
    a step of several packs or processes saves a forward pass."""

    def __post_init__(self) -> None:
        names = tuple(LOSS_ALIASES.get(name, name) for name in self.loss_types)
        # one spelling for one loss
        object.__setattr__(self, "loss_type", names[0] if len(names) == 1 else names)
        _require(self.beta > 0, f"loss.beta must be positive, got {self.beta}")
        _require(
            0 <= self.label_smoothing < 0.5, f"loss.label_smoothing must be in [0, 0.5), got {self.label_smoothing}"
        )
        _require(self.discopop_tau > 0, f"loss.discopop_tau must be positive, got {self.discopop_tau}")
        _require(
            self.label_smoothing == 0 or not SMOOTHED_LOSSES.isdisjoint(self.loss_types),
            f"loss.label_smoothing has no meaning for loss_type {self.loss_name}; set it to 0",
        )
        _require(len(self.loss_types) > 0, "loss.loss_type must name at least one loss")
        for name in ALONE & set(self.loss_types) if len(self.loss_types) > 1 else ():
            _require(False, f"loss.loss_type {name} does not add to others; name it alone")
        weights = 1 if self.loss_weights is None else len(self.loss_weights)
        _require(
            self.loss_weights is None or weights == len(self.loss_types),
            f"loss.loss_weights must have one number for each of {self.loss_name}, got {weights}",
        )
        self._check_options()
        _require(
            any(self.terms.values()),
            f"loss.loss_weights leave nothing of {self.loss_name}: give one of them a weight other than 0",
        )

    def _check_options(self) -> None:
        _require(
            self.router_aux_loss_coef is None or 0 <= self.router_aux_loss_coef < math.inf,
            f"loss.router_aux_loss_coef must not be negative, got {self.router_aux_loss_coef}",
        )
        _require(self.dpop_lambda >= 0, f"loss.dpop_lambda must not be negative, got {self.dpop_lambda}")
        _require(0 < self.shift_lambda <= 1, f"loss.shift_lambda must be in (0, 1], got {self.shift_lambda}")
        rpo, ld = self.rpo_alpha, self.ld_alpha
        _require(rpo is None or rpo > 0, f"loss.rpo_alpha must be positive or null, got {rpo}")
        _require(ld is None or 0 <= ld <= 1, f"loss.ld_alpha must be in [0, 1] or null, got {ld}")
        _require(
            self.f_divergence_type == "reverse_kl" or DIVERGENCE_LOSSES.issuperset(self.loss_types),
            f"loss.f_divergence_type {self.f_divergence_type} has no meaning for loss_type {self.loss_name}; it is for "
            f"{', '.join(sorted(DIVERGENCE_LOSSES))}",
        )
        for name in ("rpo_alpha", "ld_alpha", "use_weighting"):
            _require(
                (given := getattr(self, name)) is None or given is False or ALONE.isdisjoint(self.loss_types),
                f"loss.{name} is for pairs; it has no meaning for loss_type {self.loss_name}",
            )
        self._check_sides()
        _require(
            not self.use_weighting or not COUPLED_LOSSES & set(self.loss_types),
            "loss.use_weighting has no meaning for aot and aot_unpaired, whose losses are quantiles and not pairs",
        )
        _require(
            self.ld_alpha is None
            or not ({"aot", "aot_unpaired"} & set(self.terms) and LIKELIHOOD_LOSSES & set(self.terms)),
            f"loss.ld_alpha is not supported with {self.loss_name} together: leave out either",
        )

        for name, value in vars(self).items():
            for number in value if name == "loss_weights" and value else (value,):
                _require(
                    not isinstance(number, float) or math.isfinite(number), f"loss.{name} must be finite, got {number}"
                )

    def _check_sides(self) -> None:
        weights = {name: getattr(self, name) for name in ("desirable_weight", "undesirable_weight")}
        for name, weight in weights.items():
            _require(weight >= 0, f"loss.{name} must not be negative, got {weight}")
            _require(
                self.unpaired or weight == 1,
                f"loss.{name} is for loss_type {' and '.join(sorted(UNPAIRED_LOSSES, reverse=True))}; it has no "
                f"meaning for loss_type {self.loss_name}",
            )
        _require(any(weights.values()), "loss.desirable_weight and loss.undesirable_weight are both 0: nothing is left")

    @property
    def unpaired(self) -> bool:
        """Whether rows are each desirable or not, instead of pairs or rankings."""
        return not UNPAIRED_LOSSES.isdisjoint(self.loss_types)

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The losses that are added, usually one."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    @property
    def loss_name(self) -> str:
        """The losses in words, such as ``sigmoid + sft``."""
        return " + ".join(self.loss_types)

    @property
    def terms(self) -> dict[str, float]:
        """Every loss that is added, with its factor."""
        weights = self.loss_weights or (1.0,) * len(self.loss_types)
        terms: dict[str, float] = {}
        for name, weight in (*zip(self.loss_types, weights, strict=True), ("nll", self.rpo_alpha or 0.0)):
            if name != "nll" or weight:
                terms[name] = terms.get(name, 0.0) + weight
        return terms


def check_unpaired(loss: LossConfig, pairs_per_step: int, *, streaming: bool) -> None:
    """Raise a ``ValueError`` where a loss of unpaired rows does not fit how rows are read and divided into steps."""
    _require(
        "kto" not in loss.loss_types or pairs_per_step > 1,
        "packing.pairs_per_step must be at least 2 for loss.loss_type kto, which compares the rows of a step with each "
        "other's completions",
    )
    _require(
        not (loss.unpaired and streaming),
        f"data.streaming reads rows in windows, and loss.loss_type {loss.loss_name} has to know all of them: set "
        "data.streaming to false",
    )
