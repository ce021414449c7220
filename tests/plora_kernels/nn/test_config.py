"""A configuration is checked when it is made, as PEFT would check it when the adapter is saved or loaded."""

from __future__ import annotations

import pytest
from peft import TaskType

import plora_kernels as pk
from plora_kernels.nn.config import TASK_TYPES


def test_task_types_are_those_of_peft() -> None:
    assert {task.value for task in TaskType} == set(TASK_TYPES)


@pytest.mark.parametrize("task", [*TASK_TYPES, None, *TaskType], ids=str)
def test_a_task_type_is_kept_as_text(task: str | None) -> None:
    kept = pk.PLoRAConfig(task_type=task).task_type
    assert kept == task
    assert kept is None or type(kept) is str


@pytest.mark.parametrize("task", ["seq_cls", "SEQUENCE_CLASSIFICATION", "", 3, "IMG_CLS"], ids=str)
def test_a_task_type_that_peft_does_not_know_is_refused(task: object) -> None:
    with pytest.raises(
        pk.ConfigError, match=r"task_type is .*; it may be None or one of SEQ_CLS, .*FEATURE_EXTRACTION"
    ):
        pk.PLoRAConfig(task_type=task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": [3]}, "target_modules holds 3; names of modules are needed"),
        ({"target_modules": ["query", ""]}, "target_modules holds ''"),
        ({"target_modules": {"query": 4}}, "target_modules is a dict; a list of names is needed"),
        ({"target_modules": (name for name in ["query"])}, "target_modules is a generator"),
        ({"target_modules": ["query", "All-linear"]}, "holds 'all-linear' in a list; it stands alone"),
        ({"exclude_modules": [None]}, "exclude_modules holds None"),
        ({"modules_to_save": [""]}, "modules_to_save holds ''"),
        ({"alpha_pattern": {3: 2.0}}, "alpha_pattern holds 3"),
        ({"rank_pattern": None}, "rank_pattern is a NoneType; a mapping from names of modules is needed"),
        ({"alpha_pattern": [("query", 2.0)]}, "alpha_pattern is a list; a mapping from names of modules is needed"),
        ({"alpha_pattern": {"query": 10**400}}, "alpha is above 1.8e[+]308; a finite number is needed"),
        ({"target_modules": "(a+)+b"}, r"target_modules holds '\(a\+\)\+b', which can take for ever to match"),
        ({"exclude_modules": "(.*)*x"}, r"exclude_modules holds '\(\.\*\)\*x', which can take for ever to match"),
        ({"rank_pattern": {"(a|a)*$": 4}}, "rank_pattern holds .* which can take for ever to match"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_a_name_is_refused(options: dict, message: str) -> None:
    with pytest.raises(pk.ConfigError, match=message):
        pk.PLoRAConfig(**options)


def test_a_set_of_names_is_taken_as_peft_takes_it() -> None:
    assert pk.PLoRAConfig(target_modules={"query", "value"}).target_modules == {"query", "value"}
