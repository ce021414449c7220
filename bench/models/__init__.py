"""Training steps of one whole model: PEFT's, this library's and the bare one's, each with and without torch.compile."""
