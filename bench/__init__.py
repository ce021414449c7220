"""Benchmarks: the fused layer and fold against PEFT, compiled PEFT and the bare base matmul, in one run."""

from fed.openmp import wait_passively

# Python imports this file before any other of `bench`, so before torch: every command and suite is a program.
wait_passively()
