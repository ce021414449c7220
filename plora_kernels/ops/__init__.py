"""The operators, registered with torch.library and differentiable."""
