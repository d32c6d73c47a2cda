"""What a step costs, and how fast this machine could be: the figures behind ``perf/*``."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

from ..model import Policy
from ..model.head import output_layer
from ..model.layers import largest, layer_configs
from ..model.mixers import class_name
from ..model.quantization import num_weights

_LEAST_ROUNDS = 3
"""Tries of each product: the first one makes libraries prepare, others may lose the processor in between."""
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class FlopModel:
    """Floating-point operations that the mathematics of a step needs (a multiply-add is two).

    Forward is 2 per weight of the body and packed token, 2 D V per completion token for the head, and 4 H d per layer
    and visible query-key pair for attention (scores and values). Backward is the same again for input gradients and,
    for trainable weights, the same again for weight gradients; attention's is twice its forward. So a fully trained
    body costs 6 per weight and token. Embedding look-ups, norms and activations count nothing, nor does what is
    recomputed (gradient checkpointing, a second pass for losses that couple pairs): it is work done, not work needed.
    Of the experts of a mixture, the share that the router picks counts.
    """

    body_weights: float
    trained_body_weights: float
    head_weights: int
    head_trained: bool
    attention_width: int
    """Query heads * head dimension, summed over layers."""
    mixer_share: float = 0.0
    """Of the body's weights: those in modules that get rows."""

    @classmethod
    def of(cls, policy: Policy) -> FlopModel:
        model, config = policy.causal_lm, policy.config.get_text_config()
        output = output_layer(model)
        owners = [output, *(module for module in model.modules() if isinstance(module, nn.Embedding))]
        skipped = {id(p) for owner in owners for p in owner.parameters()}
        active = _active_share(config)
        inside = {id(p) for m in model.modules() if class_name(m) in policy.layout.mixers for p in m.parameters()}
        body = trained = mixers = 0.0
        for name, p in model.named_parameters():
            if id(p) in skipped or p.ndim < 2:
                continue
            size = num_weights(p) * (active if "expert" in name and "shared" not in name else 1.0)
            body += size
            trained += size if p.requires_grad else 0.0
            mixers += size if id(p) in inside else 0.0
        width = sum(_attention_width(layer) for layer in layer_configs(config))
        head = output.weight
        return cls(body, trained, head.numel(), head.requires_grad, width, mixers / body if mixers else 0.0)

    def step(self, packed_tokens: int, completion_tokens: int, visible_pairs: int) -> float:
        """FLOP of one optimizer step, forward and backward.

        Args:
            visible_pairs: query-key pairs that causal attention looks at (``GroupLengths.visible_pairs``).
        """
        body = packed_tokens * (4 * self.body_weights + 2 * self.trained_body_weights)
        head = completion_tokens * self.head_weights * (6 if self.head_trained else 4)
        return body + head + 12.0 * self.attention_width * visible_pairs

    def mixers(self, tokens: int) -> float:
        """FLOP of the products that modules with rows do of so many tokens: of those beyond the pack's, work that is
        done and not needed."""
        return self.mixer_share * self.step(tokens, 0, 0)


def _attention_width(layer) -> int:
    """Query heads * head dimension; 0 where the config of a layer has no number of heads, as of a state-space model."""
    heads = getattr(layer, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def _active_share(config) -> float:
    experts = largest(config, "num_local_experts", "num_experts", "n_routed_experts")
    picked = largest(config, "num_experts_per_tok")
    return picked / experts if experts and picked else 1.0


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the fastest matrix product of a run here: the peak that ``perf/mfu`` is a share of.

    The best of the tries of half a second, so that another process in between does not lower the peak. On the CPU one
    library serves some sizes and calls and not others, up to a hundred times faster in bfloat16, and what a run
    computes in float32 beside bfloat16 may be the faster part: so several are tried.
    """
    sizes = (8192,) if device.type == "cuda" else (512, 1024)
    dtypes = {dtype} if device.type == "cuda" else {dtype, torch.float32}
    tries = []
    for size, kind in product(sizes, dtypes):
        a, b = (torch.ones(size, size, device=device, dtype=kind) for _ in range(2))
        calls = (torch.mm,) if device.type == "cuda" else (torch.mm, nn.functional.linear)
        tries += [(2.0 * size**3, partial(call, a, b)) for call in calls]
    best, rounds = 0.0, 0
    deadline = time.perf_counter() + 0.5
    while rounds < _LEAST_ROUNDS or time.perf_counter() < deadline:
        rounds += 1
        for flop, multiply in tries:
            synchronize(device)
            start = time.perf_counter()
            multiply()
            synchronize(device)
            best = max(best, flop / (time.perf_counter() - start))
    return best


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far, in GiB: of the accelerator, or resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    for line in status:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    # Where the system does not tell: this starts with the peak of the process that started this one.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory(device: torch.device) -> None:
    """Count the accelerator's memory from here on. Resident memory cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait for what an accelerator was given; the CPU does things at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds of training alone: evaluation and checkpoints are not counted."""

    def __init__(self, device: torch.device):
        self.device = device
        self.total = 0.0
        self._since: float | None = None

    def start(self) -> None:
        synchronize(self.device)
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.total = self.seconds()
        self._since = None

    def seconds(self) -> float:
        """Seconds so far, all work that was issued to the device included."""
        if self._since is None:
            return self.total
        synchronize(self.device)
        return self.total + time.perf_counter() - self._since
