"""Triton kernels and their launchers, one file per family; installed as ``fusedres.kernels`` and imported on first use."""
