"""Decoder blocks compiled by ``torch.compile``, each block by itself, for packs of any length.

What decides by the data or by the pack's plan is not traced: attention, modules in rows, and mixtures of experts run as
they are, between the compiled parts. Blocks of one class share their code, so a model compiles a handful of graphs,
once for training and once for scoring, however many blocks and lengths there are.

The compiler keeps for the backward pass what is dear to compute and computes the rest again. That is what selective
checkpointing does, so compiled blocks do without it; a block is left as it is where it has parts that are not traced
beside attention, since these would then keep everything.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import nn

from ..compiling import compile_for_all_lengths
from ..experts import is_experts
from ..layers import text_model
from ..mixers import InRows, class_name
from ..policy import Policy
from ..recompute import is_selective
from .exchange import ABSENT, Change

BACKEND = "inductor"


def compile_changes(policy: Policy, backend: Any = None) -> list[Change]:
    """What compiled blocks change in a policy.

    Args:
        backend: what compiles them; inductor by default.

    Raises:
        ValueError: it has no blocks, or none that can be compiled.
    """
    blocks = decoder_blocks(policy)
    if not blocks:
        raise ValueError(f"transformers does not say what the blocks of {type(policy.causal_lm).__name__} are")
    compiled = [block for block in blocks if not _left_as_it_is(block)]
    if not compiled:
        raise ValueError("none of its blocks can be compiled: each is a mixture of experts or runs in rows")
    changes = [Change(vars(block), "forward", ABSENT, Compiled(block, backend)) for block in compiled]
    changes += [Change(vars(part), "forward", ABSENT, Opaque(part)) for block in compiled for part in _mixtures(block)]
    selective = [block for block in compiled if _checkpoints_selectively(block)]
    return changes + [Change(vars(block), "gradient_checkpointing", True, False) for block in selective]


def compile_lack(device_type: str) -> str:
    """Why no block of any model can be compiled for a kind of device; empty where one can."""
    if not torch._dynamo.is_dynamo_supported():
        return f"torch.compile does not run on Python {platform.python_version()}"
    if device_type != "cpu" and find_spec("triton") is None:
        return "triton is not installed, which torch.compile generates code for"
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    if device_type == "cpu" and not any(which(name) for name in compilers if name):
        return "there is no C++ compiler, which torch.compile generates code for"
    return ""


def decoder_blocks(policy: Policy) -> list[nn.Module]:
    """The layers that transformers itself never splits over devices, none of them inside another one."""
    names = set(getattr(policy.causal_lm, "_no_split_modules", None) or ())
    found = [module for module in text_model(policy.causal_lm).modules() if class_name(module) in names]
    inside = {id(part) for block in found for part in block.modules() if part is not block}
    return [block for block in found if id(block) not in inside]


class Compiled:
    """The forward of a compiled block. It names the block, so that a copy of a model has copies of its own."""

    def __init__(self, block: nn.Module, backend: Any = None):
        self.block = block
        self.backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block: Any = self.block
        forward = type(block).forward
        plain = _inside_checkpoint(forward)
        run = partial(_compile(plain, self.backend or BACKEND), block)
        if plain is not forward and block.gradient_checkpointing and block.training:
            # what transformers wraps around the forward of the class
            return block._gradient_checkpointing_func(partial(run, **kwargs), *args)
        return run(*args, **kwargs)


class Opaque:
    """The forward of a module that runs as it is inside a compiled block."""

    def __init__(self, module: nn.Module):
        self.module = module

    @torch.compiler.disable(reason="where tokens go is data, and hooks read the routers")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


@cache
def _compile(forward: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """One compiled function for all blocks of a class."""
    return compile_for_all_lengths(forward, backend)


def _inside_checkpoint(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward without the checkpoint that transformers wraps around it, once for every subclass."""
    while forward.__code__.co_name == "forward_with_checkpointing":
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    return forward


def _checkpoints_selectively(block: Any) -> bool:
    return bool(getattr(block, "gradient_checkpointing", False)) and is_selective(block._gradient_checkpointing_func)


def _mixtures(block: nn.Module) -> list[nn.Module]:
    """The modules of a block that hold routers and experts."""
    return [part for part in block.modules() if any(is_experts(child) for child in part.children())]


def _left_as_it_is(block: nn.Module) -> bool:
    """Whether nothing of a block is compiled."""
    rows = [part for part in block.modules() if isinstance(vars(part).get("forward"), InRows)]
    mixtures = _mixtures(block)
    return block in rows or block in mixtures or bool(_checkpoints_selectively(block) and (rows or mixtures))
