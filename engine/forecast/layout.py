"""Which layout a run will compute packs in: its start-up check, made on few layers with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..config.schema import PackingConfig, RunConfig
from ..errors import UserError
from ..model import Policy, check_packing
from ..model.layouts import mixer_words, settled
from ..model.mixers import class_name
from ..model.policy import Kind, Layout
from .shallow import build_policy, check_room, num_parameters

_DEPTHS = (1, 2, 4, 8, 16)
"""Numbers of layers that may hold every kind of module."""
_BYTES_PER_WEIGHT = 4
_NAMES: dict[Kind, str] = {"shared": "packs", "mixers": "mixers in rows", "rows": "rows", "single": "one row"}


class FoundLayout(NamedTuple):
    """What a run is taken to do."""

    layout: Layout
    packing: PackingConfig
    """With what the layout decides."""
    source: str
    """How it was found, or why it is assumed."""

    @property
    def name(self) -> str:
        return _NAMES[self.layout.kind]


def find_layout(config: RunConfig, device: torch.device) -> FoundLayout:
    """Make the start-up check of a run, without its weights.

    Raises:
        UserError: the model cannot be built, or what the configuration asks of it does not exist.
    """
    # How weights are stored decides nothing here, and quantised ones are made of real ones.
    config = replace(config, model=replace(config.model, quantization=None))
    try:
        policy, whole = _shallow(config, device)
    except UserError:
        raise
    except Exception as error:
        # Models with code of their own may do anything; the run itself will tell.
        return _assumed(config.packing, str(error) or type(error).__name__)
    try:
        check_packing(policy, share_prompts=config.packing.share_prompts, requested=config.packing.layout)
    except UserError as error:
        return _assumed(config.packing, f"with random weights {error}")
    mixers = mixer_words(whole.causal_lm, policy.layout)
    found, depth = (p.config.get_text_config().num_hidden_layers for p in (policy, whole))
    source = f"by the start-up check, on {found} of {depth} layers with random weights"
    return FoundLayout(policy.layout, settled(config.packing, policy), f"{mixers}, {source}" if mixers else source)


def _assumed(packing: PackingConfig, reason: str) -> FoundLayout:
    in_rows = packing.layout == "rows"
    layout = Layout("rows") if in_rows else Layout()
    return FoundLayout(
        layout,
        replace(packing, share_prompts=packing.share_prompts and not in_rows),
        f"assumed: {reason.splitlines()[0]}; `dpo train` takes the first layout that its start-up check finds exact",
    )


def _shallow(config: RunConfig, device: torch.device) -> tuple[Policy, Policy]:
    """The policy with the fewest layers that hold every kind of module, and all of it without data."""
    with torch.device("meta"):
        whole = build_policy(config, device, None)
        depth = whole.config.get_text_config().num_hidden_layers
        layers = next((n for n in _DEPTHS if n < depth and _kinds_of(config, device, n) == _kinds(whole)), None)
        size = num_parameters(whole if layers is None else build_policy(config, device, layers))
    check_room(_BYTES_PER_WEIGHT * size, "layers of every kind", device)
    with torch.device(device):
        return build_policy(config, device, layers), whole


def _kinds(policy: Policy) -> set[str]:
    return {class_name(module) for module in policy.modules()}


def _kinds_of(config: RunConfig, device: torch.device, layers: int) -> set[str]:
    """Of so many layers; none where there is no such model."""
    try:
        return _kinds(build_policy(config, device, layers))
    except Exception:
        # A config may list something for each layer.
        return set()
