"""Preference optimisation of a small masked-diffusion language model on the loss ops; README.md explains it."""
