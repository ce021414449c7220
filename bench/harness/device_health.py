"""Whether a device still works after something failed on it."""

import torch

from bench.harness.processes import LostProcessError, one_line


def require_device(device_type: str, error: Exception) -> None:
    """Raise LostProcessError if the device does no more work in this process: everything after `error` would fail.

    An illegal address does that to a CUDA context: every later call of the process reports it again.
    """
    if device_type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as broken:
        raise LostProcessError(f"{one_line(error)}; its process could not go on") from broken
