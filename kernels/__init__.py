"""Triton kernels and their launchers, one file per family; installed as ``fusedres.kernels``, imported on first use."""
