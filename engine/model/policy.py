"""The trained model as the engine sees it: a pack goes in, an objective of its completion tokens comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from dpo_kernels import linear_logps
from dpo_kernels.chunks import to_device
from dpo_kernels.head import Head

from ..packing.layout import PackedBatch
from ..packing.rows import Blocks, RowPlan, plan_rows
from .attention import PLAN_ARGUMENT, Backend
from .before_head import HeadUse, taken_before_head
from .head import adapted_head, read_head
from .kernels.exchange import Exchange, Kernels
from .mixers import RowsOfPack
from .offload import OffloadedActivations
from .replicas import sum_in_order
from .routers import RouterSums, experts_per_token, router_arguments, sum_routers

R = TypeVar("R")

Kind = Literal["shared", "mixers", "rows", "single"]

_BLOCKS: dict[Kind, Blocks] = {"mixers": "alike", "rows": "together", "single": "alone"}


class Layout(NamedTuple):
    """What runs on packs and what on rows."""

    kind: Kind = "shared"
    """shared: the whole model runs on packs. mixers: all but some modules do, which get rows. rows: the whole model
    runs on padded rows with a mask, in its own attention. single: on one row at a time, without padding."""
    mixers: tuple[str, ...] = ()
    """Classes of the modules that get rows."""
    reason: str = ""
    """What the next better one failed on."""
    joined: bool = False
    """Whether the rows of mixers are laid end to end, without padding."""
    padded_for: str = ""
    """What such rows failed on, where the mixers take boundaries."""

    @property
    def in_rows(self) -> bool:
        """Whether the whole model runs on rows."""
        return self.kind in ("rows", "single")

    @property
    def blocks(self) -> Blocks | None:
        """Which rows stand together; None where nothing runs on rows."""
        return "joined" if self.joined else _BLOCKS.get(self.kind)

    @property
    def mixer_blocks(self) -> Blocks | None:
        """The same of modules that get rows in packs."""
        return None if self.in_rows else self.blocks


class OwnBalance(NamedTuple):
    """What the forward of a model itself returns of its routers."""

    has_routers: bool
    """Whether it returns logits of any."""
    has_loss: bool
    """Whether it returns a load-balancing loss."""
    same: bool
    """Whether that loss, where there is one, is ours of these logits."""


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
        self.offload_host = torch.device("cpu")
        """Where they wait; on the meta device, which has no memory, they are only left out."""
        self.disabled_dropouts = 0
        """How many dropout probabilities of the model were set to 0."""
        self.recomputes = False
        """Whether backward runs the layers once more instead of keeping what they made (gradient checkpointing)."""
        self.sharded = False
        """Whether the parameters are spread over processes: see ``engine/model/shard.py``."""
        self.has_copies = False
        """Whether several processes hold the same parameters, whose gradients ``sum_gradients`` then adds."""
        self.layout = Layout()
        """How packs are computed: see ``engine/model/layouts.py``."""
        self.head_use: HeadUse | None = None
        """In rows, where factors before the head are part of what it is given: known after the first forward pass."""
        self.own_balance: OwnBalance | None = None
        """What its routers return, once that was looked at: see ``engine/model/balance.py``."""
        self.kernels = Kernels()
        """What computes the blocks, and why: see ``engine/model/kernels``."""
        self.exchange = Exchange()
        """What of the model was exchanged for them."""
        self.obstacle: str | None = None
        """Why attention of this model cannot run on packs at all: it is none that transformers lets us exchange."""

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
    def _body(self) -> Any:
        """What makes hidden states of tokens."""
        model: Any = self.causal_lm
        # Llama 4 keeps its body elsewhere than its prefix says, and is then its own base_model
        return model.model if model.base_model is model else model.base_model

    @property
    def head(self) -> Head:
        """The output layer, without low-rank adapters on it."""
        return self._scaled(read_head(self.causal_lm))

    def _scaled(self, head: Head) -> Head:
        if self.layout.in_rows and self.head_use is not None:
            return head._replace(logit_scale=self.head_use.scale)
        return head

    def autocast(self):
        """The context in which forward computes."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        # Autocast's cache holds every weight, cast, until the forward ends. That is for nothing unless backward needs
        # all of them anyway.
        kept = torch.is_grad_enabled() and not (self.sharded or self.recomputes)
        return torch.autocast(self.device.type, dtype=self.compute_dtype, cache_enabled=kept)

    def generate_ids(self, **options: Any) -> torch.Tensor:
        """transformers' ``generate`` of the model, int64 [B, T]. Of a sharded policy every rank must call this with the
        same arguments; it goes on until all of them are at the end."""
        model: Any = self.causal_lm
        return model.generate(**options, synced_gpus=self.sharded)

    def rows_of(self, batch: PackedBatch) -> RowPlan | None:
        """The rows of a batch that the layout of this policy asks for."""
        blocks = self.layout.blocks
        return None if blocks is None else plan_rows(batch.plan.segments, blocks)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Final hidden states of all packed tokens, [T, D]."""
        return self._run_body(batch)[0]

    def _run_body(
        self, batch: PackedBatch, *, router_logits: bool = False
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor] | None]:
        """[T, D], final hidden states of all packed tokens; and the logits of each router, where they are asked for."""
        rows = batch.rows_plan
        if rows is None and (planned := self.rows_of(batch)) is not None:
            rows = planned.map_tensors(lambda tensor: to_device(tensor, self.device))
        wanted = router_arguments(self.config, router_logits)
        offloaded = OffloadedActivations(self._row_counts(batch), rows, self.offload_host)
        with offloaded if self.activation_offload else nullcontext():
            if rows is not None and self.layout.in_rows:
                return self._run_in_rows(batch, rows, wanted)
            return self._run_on_pack(batch, rows, wanted)

    def _row_counts(self, batch: PackedBatch) -> tuple[int, ...]:
        """How many rows activations have: packed tokens, keys that are gathered of them, and a row for each expert that
        a token goes to."""
        keys = () if batch.plan.key_rows is None else (len(batch.plan.key_rows),)
        experts = experts_per_token(self.config.get_text_config())
        tokens = batch.num_tokens if batch.own is None else batch.own.num_tokens
        # Attention sees all tokens of a pack that several processes work on.
        return (tokens, batch.num_tokens, *keys, *(() if experts is None else (experts * tokens,)))

    def _run_on_pack(self, batch: PackedBatch, rows: RowPlan | None, wanted: dict[str, bool]):
        ids, positions = batch.input_ids_T, batch.position_ids_T
        if batch.own is not None:
            ids, positions = batch.own.input_ids_L, batch.own.position_ids_L
        with RowsOfPack(rows):
            output = self._body(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                **wanted,
                **{PLAN_ARGUMENT: batch.plan},
            )
        return output.last_hidden_state[0], getattr(output, "router_logits", None)

    def _run_in_rows(self, batch: PackedBatch, rows: RowPlan, wanted: dict[str, bool]):
        """What the head is given by the model's own forward on each block of rows."""
        padding = getattr(self.config.get_text_config(), "pad_token_id", None) or 0
        ids = rows.split(batch.input_ids_T, fill=padding)
        masks: list[torch.Tensor | None] = [None] * len(ids) if self.layout.kind == "single" else [*rows.masks()]
        blocks, routers = [], []
        for ids_BL, mask_BL in zip(ids, masks, strict=True):
            options = {} if mask_BL is None else {"attention_mask": mask_BL}
            with taken_before_head(self.causal_lm) as taken:
                output = self.causal_lm(input_ids=ids_BL, use_cache=False, **options, **wanted)
            if self.head_use is None:
                self.head_use = taken.use(output.logits)
            blocks.append(taken.hidden(self.head_use))
            routers.append([x.reshape(*ids_BL.shape, -1) for x in getattr(output, "router_logits", None) or ()])
        return rows.join(blocks), [rows.join(layer) for layer in zip(*routers, strict=True)]

    def forward(
        self, batch: PackedBatch, objective: Callable[[torch.Tensor, Head], R], *, top_k: int | None = None
    ) -> R | tuple[R, RouterSums]:
        """Run the body on a pack and ``objective`` on the rows that predict completion tokens.

        Args:
            batch: a pack on the model's device.
            objective: called with hidden [N, D], in the order of ``batch.own_labels``, and the head.
            top_k: of a mixture whose routers are to be summed: the experts that a token goes to.

        Returns:
            What the objective returns; with ``top_k`` also the sums of the routers.
        """
        with self.autocast():
            hidden_TD, logits = self._run_body(batch, router_logits=top_k is not None)
            if top_k is not None:
                sums = sum_routers(logits, batch.own_repeats, top_k)
            result = self.run_objective(batch.gather_predicting(hidden_TD), objective)
        return result if top_k is None else (result, sums)

    def run_objective(self, hidden_ND: torch.Tensor, objective: Callable[[torch.Tensor, Head], R]) -> R:
        """Call ``objective`` with the head. A head that is a unit of its own is gathered around this."""
        hidden_NE, head = adapted_head(self.causal_lm, hidden_ND)
        return objective(hidden_NE, self._scaled(head))

    def plain_routers(self, input_ids: torch.Tensor) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        """The logits of each router, and the load-balancing loss, that the model's own forward returns, if any."""
        options = {"input_ids": input_ids, "use_cache": False, **router_arguments(self.config, True)}
        with self.autocast():
            # From the logits of no router some dense models try to make a loss.
            if not (logits := getattr(self._body(**options), "router_logits", None)):
                return (), None
            output = self.causal_lm(**options)
        return getattr(output, "router_logits", None) or logits, getattr(output, "aux_loss", None)

    def plain_logits(self, input_ids: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """[B, T, V]: the model's own forward on plain sequences, for comparison; ``exact`` without autocast."""
        with nullcontext() if exact else self.autocast():
            return self.causal_lm(input_ids=input_ids, use_cache=False).logits

    def logps(self, batch: PackedBatch) -> torch.Tensor:
        """fp32 [N]: log-prob of every completion token, in the order of ``batch.labels_N``."""
        return self(batch, self.logps_of(batch))

    def logps_of(self, batch: PackedBatch) -> Callable[[torch.Tensor, Head], torch.Tensor]:
        """The objective that gives ``logps``."""

        def logps(hidden_ND: torch.Tensor, head: Head) -> torch.Tensor:
            return batch.collect(linear_logps(hidden_ND, head.weight_VD, batch.own_labels, **head.options))

        return logps

    def sum_gradients(self) -> None:
        """Add up the gradients of a step over copies of the model; over shards of one it is done after each pack."""
        if self.has_copies:
            sum_in_order([p for p in self.model.parameters() if p.requires_grad])

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
