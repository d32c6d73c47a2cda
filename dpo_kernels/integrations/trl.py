"""TRL with this package's loss head: ``FusedDPOTrainer`` for ``DPOTrainer``, or ``add_fused_lm_head`` alone.

Legend: B sequences of L tokens, M scored positions each (L - 1, or L with ``shift_labels``), T positions whose label
counts, D features, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dpo_kernels.adapters import whole
from dpo_kernels.hf_config import logit_options, router_loss
from dpo_kernels.integrations.versions import require_series
from dpo_kernels.linear_logps.api import linear_logps
from dpo_kernels.linear_logps.stats import STATS

# Before the imports that another release may not have.
require_series("trl", "1.16", __name__)

from trl import DPOTrainer  # noqa: E402
from trl.trainer import dpo_trainer  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402

IGNORE_INDEX = -100


class _HeadSettings(NamedTuple):
    """What is fixed when a model gets its head."""

    text_config: Any
    softcap: float | None
    logit_scale: float
    temperature: float
    cast_to_fp32: bool
    stats: tuple[str, ...]


def add_fused_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = ("log_probs",),
) -> None:
    """Patch ``model.forward`` so that ``model(..., labels=labels, fused_lm_head=True)`` scores labels without logits.

    Signature and output of TRL's function of this name. With ``fused_lm_head=True`` the backbone runs, then the head on
    the positions whose next label is not -100, all inside ``model.forward``, so that the hooks of DDP, FSDP and
    adapters see it. Without it the original forward runs, with its signature, so generation is as before.

    Args:
        model: a causal language model of transformers, not yet wrapped by PEFT (``peft_model.get_base_model()`` of one
            that is). Softcap and logit scale are read from its config.
        temperature: divisor of the logits.
        cast_lm_head_to_fp32: run the head in float32, outside autocast.
        outputs: fields to fill beside ``log_probs`` and ``loss``, which always are: "entropy", "log_sum_sq_probs",
            "mean_logits", "is_top1". They come from the product that gives the log-probs and carry no gradient;
            ``entropy``, which has one in TRL, raises when a gradient reaches it.

    The patched forward returns TRL's ``FusedCausalLMOutput``: per-token fields are [B, M], float32, zero where the
    label is -100; ``log_probs`` stays connected to the graph when every label is -100. ``labels`` are shifted inside;
    ``shift_labels`` are taken as they are.

    Raises:
        ValueError: an unknown output; when called, a model whose output layer is not a plain linear one.
        NotImplementedError: DeepSpeed ZeRO-3, which empties the head weight between forward and backward.
    """
    unknown = set(outputs) - {"log_probs", *STATS}
    if unknown:
        raise ValueError(f"outputs must be among log_probs, {', '.join(STATS)}; got {', '.join(sorted(unknown))}")
    if is_deepspeed_zero3_enabled():
        raise NotImplementedError("the fused head does not support DeepSpeed ZeRO-3: use ZeRO-2 or FSDP")
    text_config = model.config.get_text_config()
    softcap, logit_scale = logit_options(text_config)
    stats = tuple(name for name in STATS if name in outputs)
    settings = _HeadSettings(text_config, softcap, logit_scale, temperature, cast_lm_head_to_fp32, stats)
    original_forward = model.forward
    # Unbound where it can be, so that a deep copy runs its own weights.
    is_bound = getattr(original_forward, "__self__", None) is model
    unbound = getattr(original_forward, "__func__", None) if is_bound else None

    # Generation checks its keyword arguments against the signature of forward.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if fused_lm_head:
            return _fused_forward(self, settings, args, kwargs, labels, shift_labels, num_items_in_batch)
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        kwargs.update((name, value) for name, value in given.items() if value is not None)
        return original_forward(*args, **kwargs) if unbound is None else unbound(self, *args, **kwargs)

    forward.has_dpo_kernels_head = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


class FusedDPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` with the head of this package: same arguments, losses, gradients and metrics.

    The head replaces TRL's while ``DPOTrainer.__init__`` runs and not after it: by then a reference model may be
    wrapped for autocast, FSDP or DeepSpeed, and reference log-probs may have been precomputed.

    Raises:
        NotImplementedError: DeepSpeed ZeRO-3.
    """

    def __init__(self, *args, **kwargs) -> None:
        with _head_in_trl():
            super().__init__(*args, **kwargs)
        model: Any = self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not getattr(model.forward, "has_dpo_kernels_head", False):
            raise RuntimeError(f"TRL did not give {type(model).__name__} the fused head; its DPOTrainer has changed")


@contextmanager
def _head_in_trl() -> Iterator[None]:
    theirs = dpo_trainer.add_fused_lm_head
    dpo_trainer.add_fused_lm_head = add_fused_lm_head
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = theirs


def _fused_forward(
    model: Any,
    settings: _HeadSettings,
    args: tuple,
    kwargs: dict[str, Any],
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> FusedCausalLMOutput:
    if labels is None and shift_labels is None:
        raise ValueError("fused_lm_head=True needs labels or shift_labels; got neither")
    kwargs["use_cache"] = False
    if getattr(settings.text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    body = model.base_model(*args, **kwargs)
    # Looked up on every call: FSDP and adapters replace it after the patch.
    weight, bias = _read_head(model)
    hidden_BLD = body.last_hidden_state.to(weight.device)
    shifted_BM = shift_labels if shift_labels is not None else labels[:, 1:]  # type: ignore[index]
    fields, mask_BM = _score(settings, hidden_BLD, weight, bias, shifted_BM.to(weight.device))

    count = mask_BM.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -fields["log_probs"].sum() / count
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = router_loss(settings.text_config, body.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(settings.text_config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask_BM, aux_loss=aux_loss, **fields)


def _score(
    settings: _HeadSettings, hidden_BLD: Tensor, weight: Tensor, bias: Tensor | None, labels_BM: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Per-token fields, [B, M], and the mask of labels that count. Only rows of that mask meet the head."""
    mask_BM = labels_BM != IGNORE_INDEX
    (B, M), (L, D) = mask_BM.shape, hidden_BLD.shape[1:]
    b_T, m_T = mask_BM.nonzero(as_tuple=True)
    hidden_TD = hidden_BLD.reshape(B * L, D).index_select(0, b_T * L + m_T)
    labels_T = labels_BM[b_T, m_T]
    if settings.cast_to_fp32:
        hidden_TD = hidden_TD.float()
    autocast = torch.is_autocast_enabled(hidden_TD.device.type) and not settings.cast_to_fp32
    with torch.autocast(hidden_TD.device.type, enabled=autocast):
        if not autocast:
            weight, bias = weight.to(hidden_TD.dtype), None if bias is None else bias.to(hidden_TD.dtype)
        logps_T, stats_T = linear_logps(
            hidden_TD,
            weight,
            labels_T,
            bias=bias,
            softcap=settings.softcap,
            logit_scale=settings.logit_scale,
            temperature=settings.temperature,
            stats=settings.stats,
        )
    fields_T = {"log_probs": logps_T, **stats_T}
    if "entropy" in fields_T:
        fields_T["entropy"] = _WithoutGradient.apply(fields_T["entropy"], hidden_TD)
    rows_T = b_T * M + m_T
    fields = {name: value.new_zeros(B * M).index_copy(0, rows_T, value).view(B, M) for name, value in fields_T.items()}
    return fields, mask_BM


class _WithoutGradient(torch.autograd.Function):
    """A number for logging that must not be trained on: silence would drop a term of the loss."""

    @staticmethod
    def forward(ctx, value: Tensor, source: Tensor) -> Tensor:
        # DDP runs the backward of every output, those that no loss used with no gradient.
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None
        raise NotImplementedError(
            "the entropy of the fused head is for logging and has no gradient: use trl.trainer.add_fused_lm_head for "
            "a loss that contains entropy"
        )


def _read_head(model: Any) -> tuple[Tensor, Tensor | None]:
    layer = model.get_output_embeddings()
    kind = type(layer).__name__
    if hasattr(layer, "base_layer"):
        raise ValueError(f"the output layer is {kind}: adapters on lm_head are not supported, drop it from the targets")
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"the output layer of {type(model).__name__} is {kind}; expected a linear layer of floats")
    return whole(weight), None if bias is None else whole(bias)
