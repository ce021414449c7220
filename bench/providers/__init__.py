"""The providers that are measured: the base matmul, PEFT, torch.compile'd PEFT and this library."""
