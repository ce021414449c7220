"""Benchmarks: the fused layer and fold against PEFT, compiled PEFT and the bare base matmul, in one run."""
