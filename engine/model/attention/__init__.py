"""Attention over packs: which backend, how each computes it, and what transformers models call."""

from .choice import Backend, choose_backend
from .interface import PLAN_ARGUMENT, packed_attention, register_backends

__all__ = ["PLAN_ARGUMENT", "Backend", "choose_backend", "packed_attention", "register_backends"]
