"""The device of a run, and whether it computes in a dtype."""

from __future__ import annotations

import torch

from fed.errors import FedError, machine_fault


def find_device(name: str) -> torch.device:
    """Return the device that a configuration names; "auto" is CUDA if available, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FedError("device is 'cuda', which is not available here; 'cpu' or 'auto' would be right")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def require_dtype(dtype: torch.dtype, device: torch.device, setting: str) -> None:
    """Raise FedError, beginning with `setting`, if a device does not compute in a dtype, forward and backward."""
    emulated = dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False)
    if not emulated:
        try:
            x = torch.ones(2, 2, dtype=dtype, device=device, requires_grad=True)
            torch.nn.functional.layer_norm(x @ x, (2,)).softmax(-1).sum().backward()
            return
        except RuntimeError as error:
            if machine_fault(error) is not None:
                raise
    others = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
    raise FedError(f"{setting}: the device {device.type!r} does not compute in {_name(dtype)}; {others} would be right")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
