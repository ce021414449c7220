"""LoRA as parallel one-rank modules, fused: the public names."""

from plora_kernels.backend import backend
from plora_kernels.errors import (
    ConfigError,
    DeviceError,
    DTypeError,
    PLoRAError,
    PLoRAWarning,
    RankError,
    SelectionError,
    ShapeError,
    StateError,
    TargetError,
    UnsupportedError,
)
from plora_kernels.folding import Fold, fold, fold_, fold_many_
from plora_kernels.functional import plora_linear
from plora_kernels.nn.adapter_checkpoints import AdapterCheckpoints
from plora_kernels.nn.config import PLoRAConfig
from plora_kernels.nn.fused_peft.factory import fused_lora_factory
from plora_kernels.nn.fused_peft.fuse import fuse_peft, unfuse_peft
from plora_kernels.nn.fused_peft.report import FusionReport
from plora_kernels.nn.inject import inject
from plora_kernels.nn.injected import Injected
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.nn.peft_loading import load_peft
from plora_kernels.nn.peft_saving import save_peft
from plora_kernels.nn.row_groups import GroupModules, RowGroups, group_gradients
from plora_kernels.reference import module_average

__all__ = [
    "AdapterCheckpoints",
    "ConfigError",
    "DTypeError",
    "DeviceError",
    "Fold",
    "FusedPLoRALinear",
    "FusionReport",
    "GroupModules",
    "Injected",
    "PLoRAConfig",
    "PLoRAError",
    "PLoRAWarning",
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
    "fuse_peft",
    "fused_lora_factory",
    "group_gradients",
    "inject",
    "load_peft",
    "module_average",
    "plora_linear",
    "save_peft",
    "unfuse_peft",
]
