"""Kernels compiled for GPUs that are not there, and what came out."""
