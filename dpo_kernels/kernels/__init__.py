"""Triton kernels and their launchers, one kernel file per stage. Importing a module here needs triton."""
