"""Which implementation runs: the Triton kernels or the torch path."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from .errors import ConfigError

BACKENDS = ("triton", "torch")
# What the kernels compute in; float64 and anything else takes the torch path.
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def has_triton() -> bool:
    """Say whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Say whether Triton's interpreter is switched on, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend(device: str | torch.device | None = None) -> str:
    """Return "triton" or "torch": the implementation that runs for tensors on `device`.

    CUDA and ROCm devices run the Triton kernels if Triton is installed, every other device the torch path. The
    environment variable PLORA_BACKEND=triton|torch forces one; "triton" on a CPU needs TRITON_INTERPRET=1.

    Args:
        device: a torch device or its name; None means "cuda" where there is one, else "cpu".

    Raises:
        ConfigError: PLORA_BACKEND is neither, or asks for Triton where it cannot run.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    forced = os.environ.get("PLORA_BACKEND", "")
    if forced not in ("", *BACKENDS):
        raise ConfigError(f"PLORA_BACKEND is {forced!r}; it may be 'triton' or 'torch'")
    if forced == "triton":
        if not has_triton():
            raise ConfigError("PLORA_BACKEND=triton, but Triton is not installed; install triton or unset it")
        if kind != "cuda" and not interpreted():
            raise ConfigError(
                f"PLORA_BACKEND=triton, but the tensors are on {kind}; use a CUDA device or set TRITON_INTERPRET=1"
            )
        return "triton"
    return "triton" if kind == "cuda" and forced != "torch" and has_triton() else "torch"


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Say whether the Triton kernels take this tensor: its device's backend is Triton and its dtype fits.

    Interpreted bfloat16 takes the torch path: the interpreter multiplies bfloat16 wrongly and says nothing. So do
    tensors without storage.
    """
    if tensor.is_meta or tensor.dtype not in KERNEL_DTYPES or backend(tensor.device) != "triton":
        return False
    return not (tensor.dtype is torch.bfloat16 and interpreted())
