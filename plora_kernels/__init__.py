"""LoRA as parallel one-rank modules, fused: the public names."""

from .backend import backend
from .errors import (
    ConfigError,
    DeviceError,
    DTypeError,
    PLoRAError,
    RankError,
    SelectionError,
    ShapeError,
    StateError,
    TargetError,
    UnsupportedError,
)
from .ops import fold_, plora_linear
from .reference import module_average

__all__ = [
    "ConfigError",
    "DTypeError",
    "DeviceError",
    "PLoRAError",
    "RankError",
    "SelectionError",
    "ShapeError",
    "StateError",
    "TargetError",
    "UnsupportedError",
    "backend",
    "fold_",
    "module_average",
    "plora_linear",
]
