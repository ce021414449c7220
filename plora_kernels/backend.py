"""Which implementation runs: the Triton kernels or the torch path."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import warnings
from types import TracebackType

import torch

from plora_kernels.errors import ConfigError

BACKENDS = ("triton", "torch")
# The dtypes the kernels take; float64 and all others take the torch path.
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Devices on which a kernel did not compile. They take the torch path until the process ends.
_given_up: set[torch.device] = set()


@functools.cache
def has_triton() -> bool:
    """Say whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Say whether Triton's interpreter is switched on, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _interpreted_from_the_start() -> bool:
    """Return the first answer of `interpreted`: Triton reads the variable once, when a kernel is defined."""
    return interpreted()


def backend(device: str | torch.device | None = None) -> str:
    """Return "triton" or "torch": the implementation that runs for tensors on `device`.

    CUDA and ROCm devices run the Triton kernels if Triton is installed, every other device the torch path. The
    environment variable PLORA_BACKEND=triton|torch forces one; "triton" on a CPU needs TRITON_INTERPRET=1. After a
    kernel failed to compile on a device, which is warned about once, the device's backend is "torch".

    Args:
        device: a torch device or its name; None means "cuda" where there is one, else "cpu".

    Raises:
        ConfigError: PLORA_BACKEND is neither, or it is "triton" and Triton cannot run on the device.

    >>> backend("cpu")
    'torch'
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    kind = device.type
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
    runs = kind == "cuda" and forced != "torch" and has_triton() and _with_index(device) not in _given_up
    return "triton" if runs else "torch"


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Say whether the Triton kernels take this tensor: its device's backend is Triton and its dtype fits.

    Under Triton's interpreter bfloat16 takes the torch path, because the interpreter multiplies bfloat16 wrongly
    without an error. So do meta tensors, which have no storage.
    """
    # Shortcuts to the result of `backend`: every call of a layer runs this function.
    if not os.environ.get("PLORA_BACKEND"):
        if tensor.is_cpu:
            return False
        if tensor.is_cuda and (tensor.dtype is not torch.bfloat16 or not _interpreted_from_the_start()):
            return tensor.dtype in KERNEL_DTYPES and has_triton() and tensor.device not in _given_up
    if tensor.is_meta or tensor.dtype not in KERNEL_DTYPES or backend(tensor.device) != "triton":
        return False
    return not (tensor.dtype is torch.bfloat16 and interpreted())


class fallback_to_torch:  # noqa: N801 (read as a function, like torch.no_grad)
    """Run kernels in the `with` body; if one does not compile, warn, give up the device and continue after the body.

    The body ends with a return, so the code after it is the torch path. Errors of a kernel that compiled are raised,
    and with PLORA_BACKEND=triton all errors are.
    """

    __slots__ = ("_kernel", "_tensor")

    def __init__(self, kernel: str, tensor: torch.Tensor) -> None:
        """Take what the warning needs: the kernel's name, and a tensor on its device."""
        self._kernel, self._tensor = kernel, tensor

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Suppress an error of Triton's compiler and remember the device; let other errors pass."""
        if error is None:
            return False
        if os.environ.get("PLORA_BACKEND") == "triton" or not _is_of_the_compiler(error):
            return False
        device = _with_index(self._tensor.device)
        _given_up.add(device)
        cause = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(
            f"the Triton kernel of {self._kernel} does not compile on {_name_of(device)}: {cause[:300]}; torch "
            "computes on this device from now on (PLORA_BACKEND=triton raises the error instead)",
            stacklevel=3,
        )
        return True


def _is_of_the_compiler(error: BaseException) -> bool:
    """Say whether an error means that a kernel could not be compiled, rather than that a compiled one failed."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.split(".")[0] == "triton"}
    if names:
        return "InterpreterError" not in names
    if isinstance(error, RuntimeError):
        # Triton raises plain RuntimeErrors if it finds no driver or no C compiler, or if a compiler pass fails.
        return any(cause in str(error) for cause in ("active drivers", "C compiler", "PassManager"))
    return isinstance(error, ImportError | subprocess.CalledProcessError)


def _with_index(device: torch.device) -> torch.device:
    """Return a device with its index: "cuda" alone means the current CUDA device."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _name_of(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
