"""The dtype of an adapter's factors, given that of the weight they adapt."""

from __future__ import annotations

import torch
from torch import Tensor

from plora_kernels.checks import DTYPES, may_adapt
from plora_kernels.counter_rng import HALF
from plora_kernels.errors import ConfigError, DTypeError

_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def check_adapter_dtype(value: object) -> torch.dtype | str:
    """Return "auto" or the dtype that a setting names; raise ConfigError for anything else.

    >>> check_adapter_dtype("auto"), check_adapter_dtype("float32"), check_adapter_dtype(torch.bfloat16)
    ('auto', torch.float32, torch.bfloat16)
    """
    if value == "auto" or (isinstance(value, torch.dtype) and value in DTYPES):
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    raise ConfigError(f"adapter_dtype is {value!r}; it may be 'auto', a torch dtype or one of {', '.join(_BY_NAME)}")


def adapter_dtype_for(value: torch.dtype | str, weight: torch.dtype) -> torch.dtype:
    """Return the factors' dtype beside a weight, for a setting that `check_adapter_dtype` takes.

    "auto" is float32 over half precision, where small steps of an optimiser would be rounded away, as in PEFT
    (`autocast_adapter_dtype`), and else the weight's dtype.

    Raises:
        ConfigError: no such setting. DTypeError: factors of that dtype cannot stand beside the weight.

    >>> adapter_dtype_for("auto", torch.bfloat16), adapter_dtype_for("auto", torch.float64)
    (torch.float32, torch.float64)
    """
    dtype = check_adapter_dtype(value)
    if isinstance(dtype, str):
        return torch.float32 if weight in HALF else weight
    if not may_adapt(dtype, weight):
        also = " or torch.float32" if weight in HALF else ""
        raise DTypeError(f"adapter_dtype is {dtype}, but the weight is {weight}, which takes factors of that{also}")
    return dtype


def beside(weight: Tensor, factor: Tensor) -> Tensor:
    """Return a factor as it is if it may stand beside the weight, else in the dtype that "auto" gives it."""
    return factor if may_adapt(factor.dtype, weight.dtype) else factor.to(adapter_dtype_for("auto", weight.dtype))
