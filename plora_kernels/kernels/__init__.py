"""Triton kernels, one subject a file; imported only when a kernel is needed."""
