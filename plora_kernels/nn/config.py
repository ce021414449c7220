"""`PLoRAConfig`: what `inject` puts into a model, checked once."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

import torch
from torch import nn

from plora_kernels.checks import check_positive, check_probability
from plora_kernels.errors import ConfigError
from plora_kernels.nn.adapter_dtype import check_adapter_dtype
from plora_kernels.nn.folded_weight import check_original
from plora_kernels.nn.lora_options import options_from_peft
from plora_kernels.nn.patterns import check_pattern
from plora_kernels.selection import check_rank

# PEFT's task types. It refuses any other when the adapter is saved or loaded, which is after the training.
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
T = TypeVar("T")


@dataclass(frozen=True)
class PLoRAConfig:
    """What to inject: the rank and scale of the adapter and the modules that get one.

    Attributes:
        rank: R, the number of one-rank modules, 1–256.
        alpha: α; the scale is α/R, or α/√R if `rank_stabilized`.
        dropout: p of LoRA dropout, in training mode.
        target_modules: as in PEFT: a list of names (whole, or the end of a name after a dot), a regular expression
            that must match a whole name, or "all-linear" for every nn.Linear but the output layer. Modules that are
            saved whole, and all modules in them, are not adapted.
        exclude_modules: names or an expression, matched the same way, of modules that are not replaced.
        modules_to_save: ends of the names of modules that stay trainable in full and are saved whole with the adapter,
            such as a classification head. As in PEFT, "classifier" is also the end of "pre_classifier".
        task_type: PEFT's task type, such as "SEQ_CLS". As in PEFT, the heads of these tasks are trained in full and
            saved whole, listed in `modules_to_save` or not: modules whose names end with "classifier" or "score" for
            "SEQ_CLS" and "TOKEN_CLS", with "qa_outputs" for "QUESTION_ANS".
        rank_pattern, alpha_pattern: as in PEFT: another rank or α for modules whose name ends with the key.
        original: where the original of a folded weight is kept, "device" or "host".
        adapter_dtype: the factors' dtype: a torch dtype, its name, or "auto": float32 over a weight of half precision,
            as in PEFT, else the weight's.
        fuse_projections: compute targeted siblings that read one tensor, such as q, k and v or gate and up, together,
            and their joint input gradient too: each in one launch, but on Hopper GPUs with more than 1,024 rows of half
            precision by a product for each layer, which is faster there. The model's structure and results do not
            change.

    Raises:
        RankError, ConfigError: a value cannot be used.

    >>> config = PLoRAConfig(rank=8, alpha=16, target_modules=["q_proj", "v_proj"])
    >>> config.rank_of("layers.0.q_proj")
    8
    """

    rank: int = 16
    alpha: float = 32.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    target_modules: Sequence[str] | str = ("q_proj", "v_proj")
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] = ()
    task_type: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    original: str = "device"
    fuse_projections: bool = False
    adapter_dtype: torch.dtype | str = "auto"

    @classmethod
    def from_peft(cls, lora_config: Any, model: nn.Module | None = None, **overrides: Any) -> Self:
        """Return the configuration that injects what PEFT makes of a `LoraConfig`; other arguments replace its own.

        r, lora_alpha, use_rslora, lora_dropout, target_modules, exclude_modules, modules_to_save, rank_pattern,
        alpha_pattern and task_type are taken over. Where only a model decides which layers are meant, PEFT is asked:
        for target_modules=None, PEFT's choice for the model's type, and for layers_to_transform with layers_pattern.
        `inference_mode` says nothing here: what `inject` adapts can be trained.

        Args:
            lora_config: a `peft.LoraConfig`. model: the one to be adapted, which is not changed.
            overrides: fields of `PLoRAConfig`, such as `adapter_dtype`; `target_modules` replaces the layers that the
                LoraConfig chooses altogether.

        Raises:
            ConfigError: a field has a value that is not supported, such as use_dora=True; the model is needed and not
                given; or an override is not a field. TargetError: PEFT refuses the configuration for the model.
            RankError: a rank above 256.

        >>> from peft import LoraConfig
        >>> lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        >>> PLoRAConfig.from_peft(lora, adapter_dtype="bfloat16").rank
        8
        """
        known = [each.name for each in fields(cls)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
                raise ConfigError(f"{name!r} is not a field of PLoRAConfig; the nearest are {', '.join(near)}")
        return cls(**{**options_from_peft(lora_config, model, "target_modules" in overrides), **overrides})

    def rank_of(self, name: str) -> int:
        """Return R for the module of this name."""
        return _by_pattern(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Return α for the module of this name."""
        return _by_pattern(self.alpha_pattern, name, self.alpha)

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                kind = type(getattr(self, name)).__name__
                raise ConfigError(f"{name} is a {kind}; a mapping from names of modules is needed")
        for rank in (self.rank, *self.rank_pattern.values()):
            check_rank(rank)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            check_positive("alpha", alpha)
        check_probability("dropout", self.dropout)
        check_original(self.original)
        object.__setattr__(self, "adapter_dtype", check_adapter_dtype(self.adapter_dtype))  # the dataclass is frozen
        if isinstance(self.modules_to_save, str) or self.modules_to_save is None:
            raise ConfigError(f"modules_to_save is {self.modules_to_save!r}; a list of names is needed")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            _check_names(name, getattr(self, name))
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name modules, or use 'all-linear'")
        if not isinstance(self.target_modules, str) and any(is_all_linear(entry) for entry in self.target_modules):
            raise ConfigError(
                "target_modules holds 'all-linear' in a list; it stands alone: target_modules='all-linear'"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                _check_expression(name, pattern)
        # A member of PEFT's enumeration counts as its value.
        object.__setattr__(self, "task_type", getattr(self.task_type, "value", self.task_type))
        if self.task_type is not None:
            check_task_type(self.task_type)


def check_task_type(task_type: str) -> None:
    """Raise ConfigError unless this is one of PEFT's task types."""
    if task_type not in TASK_TYPES:
        raise ConfigError(f"task_type is {task_type!r}; it may be None or one of {', '.join(TASK_TYPES)}")


def is_all_linear(targets: Sequence[str] | str) -> bool:
    """Say whether this is "all-linear", in any case as in PEFT."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _check_names(name: str, value: Sequence[str] | str | None) -> None:
    """Raise ConfigError unless `value` is None, a regular expression, or a collection of names that are not empty."""
    if value is None:
        return
    if isinstance(value, str):
        _check_expression(name, value)
        return
    if not isinstance(value, Sequence | set | frozenset):
        raise ConfigError(f"{name} is a {type(value).__name__}; a list of names is needed")
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(f"{name} holds {entry!r}; names of modules are needed")


def _check_expression(name: str, pattern: str) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"{name} holds {pattern!r}; names of modules or expressions for them are needed")
    check_pattern(pattern, name)


def _by_pattern(pattern: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first key that matches the name."""
    return next((value for key, value in pattern.items() if pattern_matches(key, name)), default)


def pattern_matches(key: str, name: str) -> bool:
    """Say whether a key of a pattern is the end of `name` (an expression, after a dot or whole), as in PEFT."""
    return _compiled(key).match(name) is not None


@functools.lru_cache(maxsize=16384)  # a loaded adapter may have a key for each layer, more than `re` itself keeps
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
