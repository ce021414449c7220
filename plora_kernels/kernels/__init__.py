"""Triton kernels, one subject per file; imported only when a kernel is needed."""
