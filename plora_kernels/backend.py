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
# What the kernels compute in; float64 and anything else takes the torch path.
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Devices on which a kernel did not compile: they take the torch path until the process ends.
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
    """Say the same without asking the environment anew: Triton asks it once, where a kernel is defined."""
    return interpreted()


def backend(device: str | torch.device | None = None) -> str:
    """Return "triton" or "torch": the implementation that runs for tensors on `device`.

    CUDA and ROCm devices run the Triton kernels if Triton is installed, every other device the torch path. The
    environment variable PLORA_BACKEND=triton|torch forces one; "triton" on a CPU needs TRITON_INTERPRET=1. Where a
    kernel did not compile, which a warning has told, it is "torch" from then on.

    Args:
        device: a torch device or its name; None means "cuda" where there is one, else "cpu".

    Raises:
        ConfigError: PLORA_BACKEND is neither, or asks for Triton where it cannot run.

    >>> backend("cpu") if "PLORA_BACKEND" not in os.environ else "torch"
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

    Interpreted bfloat16 takes the torch path: the interpreter multiplies bfloat16 wrongly and says nothing. So do
    tensors without storage.
    """
    if not os.environ.get("PLORA_BACKEND"):  # asked for at every call of a layer: the short ways to the same answer
        if tensor.is_cpu:
            return False
        if tensor.is_cuda and (tensor.dtype is not torch.bfloat16 or not _interpreted_from_the_start()):
            return tensor.dtype in KERNEL_DTYPES and has_triton() and tensor.device not in _given_up
    if tensor.is_meta or tensor.dtype not in KERNEL_DTYPES or backend(tensor.device) != "triton":
        return False
    return not (tensor.dtype is torch.bfloat16 and interpreted())


class fallback_to_torch:  # noqa: N801 (read as a function, like torch.no_grad)
    """Run kernels in the body; where one does not compile, warn once, give the device up and go on after the body.

    The body ends with a return, what follows it is the torch path. Errors of a running kernel are raised, and so is
    everything where PLORA_BACKEND=triton asks for the kernels.
    """

    __slots__ = ("_kernel", "_tensor")

    def __init__(self, kernel: str, tensor: torch.Tensor) -> None:
        """Name the kernel and a tensor on its device for the warning."""
        self._kernel, self._tensor = kernel, tensor

    def __enter__(self) -> None:
        """Begin the body."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Say that an error of the compiler's is dealt with."""
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
    """Say whether an error means that there is no kernel, rather than that a kernel went wrong."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.split(".")[0] == "triton"}
    if names:
        return "InterpreterError" not in names
    if isinstance(error, RuntimeError):
        # Triton raises plain ones where it finds no driver or no C compiler, and where its passes fail.
        return any(cause in str(error) for cause in ("active drivers", "C compiler", "PassManager"))
    return isinstance(error, ImportError | subprocess.CalledProcessError)


def _with_index(device: torch.device) -> torch.device:
    """Return a device with its number: "cuda" is the current one."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _name_of(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
