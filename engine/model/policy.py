"""The trained model as the engine sees it: a pack goes in, an objective of its completion tokens comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from dpo_kernels import linear_logps
from dpo_kernels.head import Head

from ..packing.layout import PackedBatch
from .attention import PLAN_ARGUMENT, Backend
from .head import adapted_head, read_head
from .offload import OffloadedActivations
from .routers import RouterSums, router_arguments, sum_routers

R = TypeVar("R")


class Policy(nn.Module):
    """A transformers causal language model, or a peft model around one, that runs on packs.

    The objective is called inside ``forward``, so that the hooks of distributed wrappers fire around the head, too.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: Backend,
        compute_dtype: torch.dtype,
        reference_adapter: str | None = None,
    ):
        super().__init__()
        self.model = model
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.reference_adapter = reference_adapter
        """Name of the frozen adapter that is part of the reference; None when the reference has none."""
        self.activation_offload = False
        """Whether activations wait for the backward pass in host memory."""
        self.disabled_dropouts = 0
        """How many dropout probabilities of the model were set to 0."""
        self.recomputes = False
        """Whether backward runs the layers once more instead of keeping what they made (gradient checkpointing)."""
        self.sharded = False
        """Whether the parameters are spread over processes: see ``engine/model/shard.py``."""

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model, without the peft wrapper."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def config(self):
        """The transformers config."""
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def head(self) -> Head:
        """The output layer, without low-rank adapters on it."""
        return read_head(self.causal_lm)

    def autocast(self):
        """The context in which forward computes."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        # Autocast's cache holds every weight, cast, until the forward ends. That is for nothing unless backward needs
        # all of them anyway.
        kept = torch.is_grad_enabled() and not (self.sharded or self.recomputes)
        return torch.autocast(self.device.type, dtype=self.compute_dtype, cache_enabled=kept)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Final hidden states of all packed tokens, [T, D]."""
        return self._body_output(batch).last_hidden_state[0]

    def _body_output(self, batch: PackedBatch, *, router_logits: bool = False) -> Any:
        """What the body returns of all packed tokens, the logits of its routers where they are asked for."""
        model: Any = self.causal_lm
        # Llama 4 keeps its body elsewhere than its prefix says, and is then its own base_model
        body = model.model if model.base_model is model else model.base_model
        with OffloadedActivations(batch.num_tokens) if self.activation_offload else nullcontext():
            return body(
                input_ids=batch.input_ids_T[None],
                position_ids=batch.position_ids_T[None],
                use_cache=False,
                **router_arguments(self.config, router_logits),
                **{PLAN_ARGUMENT: batch.plan},
            )

    def forward(
        self, batch: PackedBatch, objective: Callable[[torch.Tensor, Head], R], *, top_k: int | None = None
    ) -> R | tuple[R, RouterSums]:
        """Run the body on a pack and ``objective`` on the rows that predict completion tokens.

        Args:
            batch: a pack on the model's device.
            objective: called with hidden [N, D], in the order of ``batch.labels_N``, and the head.
            top_k: of a mixture whose routers are to be summed: the experts that a token goes to.

        Returns:
            What the objective returns; with ``top_k`` also the sums of the routers.
        """
        with self.autocast():
            if top_k is None:
                hidden_TD = self.hidden_states(batch)
            else:
                output = self._body_output(batch, router_logits=True)
                hidden_TD = output.last_hidden_state[0]
                sums = sum_routers(getattr(output, "router_logits", None), batch.repeats_T, top_k)
            result = self.run_objective(batch.gather_predicting(hidden_TD), objective)
        return result if top_k is None else (result, sums)

    def run_objective(self, hidden_ND: torch.Tensor, objective: Callable[[torch.Tensor, Head], R]) -> R:
        """Call ``objective`` with the head. A head that is a unit of its own is gathered around this."""
        return objective(*adapted_head(self.causal_lm, hidden_ND))

    def plain_logits(self, input_ids: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """[B, T, V]: the model's own forward on plain sequences, for comparison; ``exact`` without autocast."""
        with nullcontext() if exact else self.autocast():
            return self.causal_lm(input_ids=input_ids, use_cache=False).logits

    def logps(self, batch: PackedBatch) -> torch.Tensor:
        """fp32 [N]: log-prob of every completion token, in the order of ``batch.labels_N``."""
        return self(batch, self.logps_of(batch))

    def logps_of(self, batch: PackedBatch) -> Callable[[torch.Tensor, Head], torch.Tensor]:
        """The objective that gives ``logps``."""
        return lambda hidden, head: linear_logps(hidden, head.weight_VD, batch.labels_N, **head.options)

    @contextmanager
    def reference_mode(self) -> Iterator[None]:
        """The model as it was before training: adapters are off, or the frozen copy of a trained one is on.

        Without adapters, the model as it is.
        """
        model: Any = self.model
        if not self.has_adapter:
            yield
        elif self.reference_adapter is None:
            with model.disable_adapter():
                yield
        else:
            # The layers alone are switched: peft 0.18 can freeze what it switches to only there.
            model.base_model.set_adapter(self.reference_adapter, inference_mode=True)
            try:
                yield
            finally:
                model.base_model.set_adapter(model.active_adapter)
