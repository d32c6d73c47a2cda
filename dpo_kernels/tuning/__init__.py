"""Finds tile shapes for the GPU at hand: `dpo bench tune`, or `python -m dpo_kernels.tuning`."""
