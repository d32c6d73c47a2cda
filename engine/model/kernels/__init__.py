"""Decoder blocks computed with fewer, larger kernels: which ones, and how they replace a model's own."""
