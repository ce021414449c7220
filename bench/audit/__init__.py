"""Compiling the kernels for GPUs that are absent, and reading the machine code."""
