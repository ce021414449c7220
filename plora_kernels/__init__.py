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
from .folding import Fold, fold, fold_, fold_many_
from .functional import plora_linear
from .inject import Injected, PLoRAConfig, inject
from .linear import FusedPLoRALinear
from .peft import load_peft, save_peft
from .reference import module_average
from .row_groups import GroupModules, RowGroups, group_gradients

__all__ = [
    "ConfigError",
    "DTypeError",
    "DeviceError",
    "Fold",
    "FusedPLoRALinear",
    "GroupModules",
    "Injected",
    "PLoRAConfig",
    "PLoRAError",
    "RankError",
    "RowGroups",
    "SelectionError",
    "ShapeError",
    "StateError",
    "TargetError",
    "UnsupportedError",
    "backend",
    "fold",
    "fold_",
    "fold_many_",
    "group_gradients",
    "inject",
    "load_peft",
    "module_average",
    "plora_linear",
    "save_peft",
]
