"""Which implementation runs here, in words: what ``describe`` answers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import NamedTuple

import torch

from dpo_kernels.dispatch import Choice, choose
from dpo_kernels.linear_logps.stats import STATS


class Description(NamedTuple):
    """What ``auto`` picks for tensors of a device and dtype."""

    device: str
    dtype: str
    linear_logps: Choice
    linear_logps_stats: Choice
    """``linear_logps`` with statistics of tokens."""
    linear_logps_filtered: Choice
    """``linear_logps`` with ``filter_mass``; "none" where it would be refused."""
    linear_dpo_loss: Choice
    torch_version: str
    triton_version: str | None
    hopper: str = ""
    """Whether tiles of logits are computed by ``csrc/hopper_logits.cu``, or why not; empty without Triton kernels."""

    def __str__(self) -> str:
        triton = f"triton {self.triton_version}" if self.triton_version else "no triton"
        lines = [f"dpo_kernels on {self.device} {self.dtype} (torch {self.torch_version}, {triton})"]
        choices = {
            "linear_logps": self.linear_logps,
            "linear_logps with stats": self.linear_logps_stats,
            "linear_logps with filter_mass": self.linear_logps_filtered,
            "linear_dpo_loss": self.linear_dpo_loss,
        }
        lines += [f"  {name}: {choice.impl} ({choice.reason})" for name, choice in choices.items()]
        lines += [f"  tiles of logits: {self.hopper}"] if self.hopper else []
        return "\n".join(lines)


def _choose_filtered(device: torch.device, dtype: torch.dtype) -> Choice:
    try:
        return choose("linear_logps", "auto", device, dtype, filtered=True)
    except RuntimeError as error:
        return Choice("none", str(error))


def _hopper(device: torch.device, dtype: torch.dtype) -> str:
    if choose("linear_logps", "auto", device, dtype).impl != "triton":
        return ""
    from dpo_kernels.kernels import hopper

    obstacle = hopper.why_not(device, dtype)
    return "hopper (csrc/hopper_logits.cu)" if obstacle is None else f"triton (no Hopper kernels: {obstacle})"


def describe(device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> Description:
    """Which implementation ``impl="auto"`` picks here, and why.

    Args:
        device: where the tensors will be; by default the first CUDA device when there is one, else the CPU.
        dtype: dtype of hidden states and weight.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    version = None
    if importlib.util.find_spec("triton") is not None:
        version = importlib.metadata.version("triton")
    return Description(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        linear_logps=choose("linear_logps", "auto", device, dtype),
        linear_logps_stats=choose("linear_logps", "auto", device, dtype, STATS),
        linear_logps_filtered=_choose_filtered(device, dtype),
        linear_dpo_loss=choose("linear_dpo", "auto", device, dtype),
        torch_version=torch.__version__,
        triton_version=version,
        hopper=_hopper(device, dtype),
    )
