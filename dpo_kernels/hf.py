"""The ops in a training loop of one's own around a Hugging Face model: rows from a batch, and a head inside the model.

``attach_head(model)`` once, then ``model(**batch, objective=pair_loss(ref_logps, beta=0.1)).loss.backward()``. The op
runs inside the model's forward, so that the hooks of DDP, FSDP2 and accelerate fire around it. The model is only used
through what transformers models have in common; ``examples/own_loop.py`` is a whole loop.

Legend: B sequences of L tokens, D features, V vocabulary, T rows whose label counts, S = B responses, r rank.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_kernels.adapters import active_copy, as_linear, whole, with_adapters
from dpo_kernels.chunks import to_device
from dpo_kernels.head import Head
from dpo_kernels.hf_config import logit_options, router_loss
from dpo_kernels.linear_dpo.api import LinearDPOLoss, linear_dpo_loss
from dpo_kernels.linear_dpo.ops import response_sums
from dpo_kernels.linear_logps.api import linear_logps

Order = Literal["halves", "interleaved"]
ORDERS = ("halves", "interleaved")
IGNORE_INDEX = -100

_HEAD_OPTIONS = ("bias", "softcap", "logit_scale", "temperature")
"""Keywords of the loss that the model itself decides."""


class CompletionRows(NamedTuple):
    """What ``linear_logps`` and ``linear_dpo_loss`` take of a batch: chosen_0, rejected_0, chosen_1, ... end to end."""

    hidden_TD: Tensor
    """Each the state that predicts the label beside it: the one before it in its sequence."""
    labels_T: Tensor
    cu_responses: Tensor
    """int64 [S + 1], on the CPU."""


Objective = Callable[[CompletionRows, Head], Any]
"""What runs inside the model's forward. Its result is what the forward returns."""


def completion_rows(
    hidden_BLD: Tensor,
    *,
    labels: Tensor | None = None,
    input_ids: Tensor | None = None,
    completion_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    order: Order = "halves",
    ignore_index: int = IGNORE_INDEX,
) -> CompletionRows:
    """The rows of a padded batch whose labels count, each beside the state that predicts it.

    Labels are shifted here and nowhere else: the token at position t is predicted by the state at t - 1. A first token
    has no such state and is left out, and so is what ``attention_mask`` calls padding or would predict from padding.

    Args:
        hidden_BLD: [B, L, D], the last hidden states.
        labels: [B, L], as transformers takes them: not shifted, ``ignore_index`` where a token does not count. Or
        input_ids, completion_mask: [B, L] each, as TRL's collator makes them: 1 where a token is of the completion.
            Beside ``labels`` the ids are compared with them, so that labels that were shifted already are refused.
            Every sequence needs a token that counts.
        attention_mask: [B, L] of 0 and 1, padding on either side; None for no padding.
        order: "halves", all chosen and then all rejected, as TRL collates them; or "interleaved", chosen and rejected
            in turn.

    Raises:
        ValueError: says what was passed and what to pass.
    """
    if hidden_BLD.ndim != 3:
        raise ValueError(f"hidden states must have shape [sequences, tokens, features]; got {list(hidden_BLD.shape)}")
    (B, L), device = hidden_BLD.shape[:2], hidden_BLD.device
    _check_order(order, B)
    _check_shapes(
        B, L, labels=labels, input_ids=input_ids, completion_mask=completion_mask, attention_mask=attention_mask
    )
    _check_mask("attention_mask", attention_mask)
    _check_mask("completion_mask", completion_mask)
    labels_BL, counts_BL = _labels(labels, input_ids, completion_mask, ignore_index)
    labels_BL, counts_BL = labels_BL.to(device), counts_BL.to(device).clone()
    counts_BL[:, 0] = False
    if attention_mask is not None:
        real_BL = attention_mask.to(device) != 0
        counts_BL &= real_BL
        counts_BL[:, 1:] &= real_BL[:, :-1]
    rank_B = torch.arange(B, device=device)
    sequences_B = rank_B.view(2, B // 2).T.reshape(B) if order == "halves" else rank_B
    sequence_T, token_T = counts_BL[sequences_B].nonzero(as_tuple=True)
    lengths_B = torch.bincount(sequence_T, minlength=B).cpu()
    for place in (lengths_B == 0).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"sequence {int(sequences_B[place])} of the batch has no token that counts: all of its labels are "
            f"{ignore_index}, masked or without a token before them; leave its pair out"
        )
    cu_responses = torch.cat((lengths_B.new_zeros(1), lengths_B.cumsum(0)))
    rows_T = sequences_B[sequence_T] * L + token_T
    hidden_TD = hidden_BLD.reshape(B * L, -1).index_select(0, rows_T - 1)
    return CompletionRows(hidden_TD, labels_BL.reshape(-1).index_select(0, rows_T), cu_responses)


def _check_shapes(B: int, L: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (B, L):
            hint = ": pass the 2-d mask of the tokenizer" if name == "attention_mask" else ""
            raise ValueError(f"{name} must have shape [{B}, {L}], like the tokens; got {list(tensor.shape)}{hint}")


def _check_order(order: str, B: int) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    if B % 2:
        how = "chosen sequences, then as many rejected ones" if order == "halves" else "chosen and rejected in turn"
        raise ValueError(f"a batch of pairs must hold {how}; got {B} sequences")


def _check_mask(name: str, mask: Tensor | None) -> None:
    if mask is not None and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{name} must hold 0 and 1; numbers above 1 look like packed sequences, others like a mask that is added "
            "to scores"
        )


def _labels(
    labels: Tensor | None, input_ids: Tensor | None, completion_mask: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Unshifted labels and which of them count."""
    if labels is None:
        if input_ids is None or completion_mask is None:
            raise ValueError("pass labels, with -100 where a token does not count, or input_ids and completion_mask")
        return input_ids, completion_mask.to(input_ids.device) != 0
    if completion_mask is not None:
        raise ValueError("pass labels or completion_mask, not both: they say the same thing")
    counts_BL = labels != ignore_index
    if input_ids is not None:
        other_BL = counts_BL & (labels != input_ids.to(labels.device))
        if bool(other_BL.any()):
            b, t = other_BL.nonzero()[0].tolist()
            shifted = t + 1 < labels.shape[1] and int(labels[b, t]) == int(input_ids[b, t + 1])
            hint = "; they seem to be shifted already" if shifted else ""
            raise ValueError(
                f"labels must be the input_ids, not shifted, or {ignore_index}; got label {int(labels[b, t])} for "
                f"token {int(input_ids[b, t])} at [{b}, {t}]{hint}"
            )
    return labels, counts_BL


def pair_loss(ref_logps: Tensor | None, **options: Any) -> Objective:
    """The objective ``linear_dpo_loss``: the model's forward then returns its ``LinearDPOLoss``.

    Args:
        ref_logps: [S], as ``response_logps`` gives them: chosen_0, rejected_0, chosen_1, ...; None for losses without a
            reference. Any device. They do not travel as an argument of the model, where FSDP2 would round them to the
            dtype of its parameters.
        options: keywords of ``linear_dpo_loss``: ``loss_type``, ``beta`` and so on, but for those of the head, which
            come from the model.

    Raises:
        ValueError: a keyword of the head.
    """
    if of_model := [name for name in _HEAD_OPTIONS if name in options]:
        raise ValueError(f"pair_loss reads {', '.join(of_model)} from the model and its config: leave it out")

    def objective(rows: CompletionRows, head: Head) -> Any:
        device = rows.hidden_TD.device
        ref = None if ref_logps is None else to_device(ref_logps, device)
        moved: dict[str, Any] = {name: to_device(x, device) for name, x in options.items() if isinstance(x, Tensor)}
        given: dict[str, Any] = {**options, **moved, **head.options}
        return linear_dpo_loss(rows.hidden_TD, head.weight_VD, rows.labels_T, rows.cu_responses, ref, **given)

    return objective


def response_logps(rows: CompletionRows, head: Head) -> Tensor:
    """The objective of a reference model: fp32 [S], log-probs summed per response, chosen_0, rejected_0, ..."""
    logps_T = linear_logps(rows.hidden_TD, head.weight_VD, rows.labels_T, **head.options)
    return response_sums(logps_T, rows.cu_responses)


def attach_head(model: Any, *, order: Order = "halves", check: bool = True) -> None:
    """Let ``model(..., labels=..., objective=...)`` run an objective on completion rows instead of forming logits.

    It then returns what the objective returns: under ``pair_loss`` a ``LinearDPOLoss``, whatever ``return_dict`` says.
    Without ``objective`` the forward is the original one, with its signature, so generation is as before. The forward
    takes ``labels``, or ``completion_mask`` beside ``input_ids``, as ``completion_rows`` does. Adapters on the head are
    part of it, dropout included; adapters that are off (``disable_adapter``) are not. With ``output_router_logits`` in
    the config the router's loss, times its coefficient, is added to an objective's ``loss``.

    The model becomes an instance of a subclass of its class, so deep copies, pickles and ``torch.save(model)`` have the
    head, too; a model that ``from_pretrained`` reads is a new one.

    Args:
        model: a causal language model of transformers, or a peft model around one; before or after ``fully_shard``,
            before DDP and ``accelerator.prepare``.
        order: how batches are laid out, as in ``completion_rows``.
        check: compare the log-probs of four tokens with the model's own logits, and refuse a model whose logits are
            more than its config says. Left out by itself where parameters are sharded or have no values yet.

    Raises:
        ValueError: a model whose output layer is not a linear one, or which gives other log-probs.
    """
    _check_order(order, 2)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("attach_head takes the model itself: call it before DistributedDataParallel(model)")
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(causal_lm, "get_output_embeddings") or not hasattr(causal_lm, "base_model"):
        raise ValueError(f"attach_head takes a causal language model of transformers; got {type(causal_lm).__name__}")
    _check_layer(causal_lm)
    kind: Any = type(causal_lm)
    attributes = dict(causal_lm.__dict__)
    if not issubclass(kind, _WithHead):
        causal_lm.__class__ = _with_head(kind)
        # A forward of the instance, such as the hooks of accelerate, would hide that of the class.
        if "forward" in attributes:
            causal_lm._forward_below_head = _unbound(causal_lm.__dict__.pop("forward"), causal_lm)
    causal_lm._order_of_pairs = order
    if check and not any(p.is_meta or isinstance(p, DTensor) for p in causal_lm.parameters()):
        try:
            _check_logits(causal_lm)
        except ValueError:
            causal_lm.__class__ = kind
            causal_lm.__dict__.clear()
            causal_lm.__dict__.update(attributes)
            raise


class _WithHead:
    """What the class of a model is derived from, beside its own class, which comes last."""

    def __reduce_ex__(self, protocol):
        # Pickle finds a class by its name, which is that of the original here.
        return (_blank, (type(self).__bases__[-1],), *super().__reduce_ex__(protocol)[2:])


@functools.cache
def _with_head(kind: Any) -> Any:
    """A subclass of the same name, by which transformers and peft look models up."""

    # Generation checks its keyword arguments against the signature of forward.
    @functools.wraps(kind.forward)
    def forward(self, *args, objective: Objective | None = None, **kwargs):
        if objective is None:
            below, takes_self = self.__dict__.get("_forward_below_head", (kind.forward, True))
            return below(self, *args, **kwargs) if takes_self else below(*args, **kwargs)
        names = list(inspect.signature(kind.forward).parameters)[1:]
        return _forward(self, objective, {**dict(zip(names, args, strict=False)), **kwargs})

    namespace = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_WithHead, kind), namespace)


def _unbound(function: Any, model: Any) -> tuple[Any, bool]:
    """A function of a model and whether it takes the model: pickle looks a bound one up by name, and finds another."""
    of_model = getattr(function, "__self__", None) is model
    return (function.__func__, True) if of_model else (function, False)


def _blank(kind: Any) -> Any:
    """A model with a head to be filled with what was pickled of another one."""
    made = _with_head(kind)
    return made.__new__(made)


def _forward(model: Any, objective: Objective, kwargs: dict[str, Any]) -> Any:
    labels, completion_mask = kwargs.pop("labels", None), kwargs.pop("completion_mask", None)
    kwargs["use_cache"] = False
    if not kwargs.pop("return_dict", True) or not getattr(model.config, "return_dict", True):
        kwargs["return_dict"] = True
    if (ids := kwargs.get("input_ids")) is not None and ids.ndim == 2:
        # The model's own words for it name neither.
        _check_shapes(
            *ids.shape, labels=labels, completion_mask=completion_mask, attention_mask=kwargs.get("attention_mask")
        )
    config = model.config.get_text_config()
    routed = bool(getattr(config, "output_router_logits", False))
    if routed:
        kwargs["output_router_logits"] = True
        if getattr(config, "router_aux_loss_coef", None) is None:
            raise ValueError(
                f"output_router_logits=True, but the config of {config.model_type} has no router_aux_loss_coef: set "
                "it, or set output_router_logits to False"
            )
    # Llama 4 keeps its body elsewhere than its prefix says, and is then its own base_model.
    body = (model.model if model.base_model is model else model.base_model)(**kwargs)
    rows = completion_rows(
        body.last_hidden_state,
        labels=labels,
        input_ids=kwargs.get("input_ids"),
        completion_mask=completion_mask,
        attention_mask=kwargs.get("attention_mask"),
        order=model._order_of_pairs,
    )
    hidden_TD, head = read_head(model, rows.hidden_TD)
    found = objective(rows._replace(hidden_TD=hidden_TD), head)
    if routed and hasattr(found, "loss"):
        aux = router_loss(config, getattr(body, "router_logits", None), kwargs.get("attention_mask"))
        found = found._replace(loss=found.loss + config.router_aux_loss_coef * aux)
    return found


def _check_layer(model: Any) -> Any:
    """The output layer, without the wrapper of a peft that trains a copy of it."""
    layer = active_copy(model.get_output_embeddings())
    base = layer.base_layer if hasattr(layer, "lora_A") else layer
    weight = getattr(base, "weight", None)
    if not isinstance(base, nn.Linear) or weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"the output layer of {type(model).__name__} is {type(base).__name__}; expected a linear layer of floats, "
            "or one with LoRA on it (for other adapters and quantised heads leave lm_head out of the targets)"
        )
    return layer


def read_head(model: Any, hidden_TD: Tensor) -> tuple[Tensor, Head]:
    """Hidden states and head for the ops. Softcap and scale come from the model's config.

    With LoRA on the output layer both are wider, as ``dpo_kernels.adapters`` makes them.

    Returns:
        Hidden states, [T, D] or with adapters [T, D + some], and the head, [V, D] or [V, D + some].

    Raises:
        ValueError: an output layer that is not linear, or adapters of another kind on it.
    """
    layer = _check_layer(model)
    base = layer.base_layer if hasattr(layer, "lora_A") else layer
    if layer is not base and layer.disable_adapters and layer.merged:
        # As the layer's own forward does.
        layer.unmerge()
    weight, bias = as_linear(base)
    weight, bias = whole(weight), None if bias is None else whole(bias)
    if isinstance(base.weight, DTensor) and not torch.is_autocast_enabled(hidden_TD.device.type):
        # Where FSDP2 gathers, it gives a parameter the dtype in which it computes; here it did not.
        weight, bias = weight.to(hidden_TD.dtype), None if bias is None else bias.to(hidden_TD.dtype)
    softcap, scale = logit_options(model.config.get_text_config())
    if layer is not base:
        hidden_TD, weight, bias = with_adapters(layer, hidden_TD, weight, bias)
    return hidden_TD, Head(weight, bias, softcap, scale)


@torch.no_grad()
def _check_logits(model: Any) -> None:
    """Raise ValueError where the head of the config is not the head of the model."""
    modes = {module: module.training for module in model.modules()}
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(1, 5, device=device)[None] % model.config.get_text_config().vocab_size
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        found = model(input_ids=ids.repeat(2, 1), labels=ids.repeat(2, 1), objective=_token_logps)
    finally:
        for module, mode in modes.items():
            module.training = mode
    expected = logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None].to(logits.device)).squeeze(1)
    off = float((found[:3].to(expected) - expected).abs().max())
    if not off <= 1e-3 + 8 * torch.finfo(logits.dtype).eps * float(logits.abs().max()):
        raise ValueError(
            f"{type(model).__name__} gives log-probs that differ by {off:.3g} nats from its hidden states under its "
            "head: it does more with its logits than its config says; use linear_logps with the options that it needs"
        )


def _token_logps(rows: CompletionRows, head: Head) -> Tensor:
    return linear_logps(rows.hidden_TD, head.weight_VD, rows.labels_T, **head.options)


__all__ = ["CompletionRows", "LinearDPOLoss", "attach_head", "completion_rows", "pair_loss", "read_head",
           "response_logps"]  # fmt: skip
