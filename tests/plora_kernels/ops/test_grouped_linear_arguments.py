"""Arguments that the grouped form refuses, and the errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels.selection import index_from_mask

GOOD = {"x": (10, 7), "weight": (6, 7), "lora_A": (3, 4, 7), "lora_B": (3, 6, 4)}


def call_with(**changes: object) -> Tensor:
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    return pk.plora_linear(**{**tensors, "groups": [0, 4, 4, 10], **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([0, 4, 9], pk.ShapeError, r"lora_A is \(3, 4, 7\); 2 groups and weight \(N=6, K=7\) need \(2, R, 7\)"),
        ([0, 4, 4, 9], pk.ShapeError, "groups runs from 0 to 9; x has 10 rows and needs 0 to 10"),
        ([1, 4, 4, 10], pk.ShapeError, "groups runs from 1 to 10; x has 10 rows and needs 0 to 10"),
        ([0, 4, 3, 10], pk.ShapeError, "groups falls from 4 to 3 at group 1; offsets may not decrease"),
        ([0, 12, 4, 10], pk.ShapeError, "groups falls from 12 to 4 at group 1; offsets may not decrease"),
        ([10], pk.ShapeError, r"groups is \(1,\); the offsets of C ≥ 1 groups are \(C\+1,\)"),
        ([[0, 10]], pk.ShapeError, r"groups is \(1, 2\); the offsets"),
        ([0.0, 1.0], pk.DTypeError, "groups is torch.float32; offsets are int32 or int64"),
        (torch.tensor([0, 10], device="meta"), pk.DeviceError, "groups is on meta, x on cpu"),
    ],
    ids=str,
)
def test_wrong_groups_are_named(groups: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call_with(groups=groups)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lora_A": torch.zeros(4, 7)}, pk.ShapeError, r"lora_A is \(4, 7\); 3 groups and weight"),
        ({"lora_A": torch.zeros(3, 4, 8)}, pk.ShapeError, r"lora_A is \(3, 4, 8\).*need \(3, R, 7\)"),
        ({"lora_B": torch.zeros(3, 4, 6)}, pk.ShapeError, r"lora_B is \(3, 4, 6\).*need \(3, 6, 4\)"),
        ({"lora_A": torch.zeros(3, 257, 7)}, pk.RankError, "rank is 257"),
        ({"weight": torch.zeros(6)}, pk.ShapeError, r"weight is \(6,\); a matrix"),
        ({"x": torch.zeros(10, 6)}, pk.ShapeError, r"x is \(10, 6\); weight \(N=6, K=7\) needs"),
        ({"selected": [[0], [1]]}, pk.ShapeError, "selected holds 2 selections; 3 groups need one each"),
        ({"selected": [[0], [1], [4]]}, pk.SelectionError, "selected holds module 4; rank 4 has modules 0 to 3"),
        ({"selected": torch.ones(4).bool()}, pk.ShapeError, r"selected is \(4,\); 3 groups of rank 4 need \(3, 4\)"),
        ({"scale": [1.0, 2.0]}, pk.ShapeError, r"scale is \(2,\); 3 groups need one number or \(3,\)"),
        ({"scale": torch.tensor(1.0)}, pk.ShapeError, r"scale is \(\); 3 groups need one number or \(3,\)"),
        ({"scale": [1.0, 2.0, float("nan")]}, pk.ConfigError, "scale is nan; a finite number is needed"),
        ({"scale": torch.ones(3, requires_grad=True)}, pk.ConfigError, "constant floats are needed"),
        ({"scale": "abc"}, pk.ConfigError, "scale is 'abc'; a finite number is needed"),
        ({"dropout_p": 0.1}, pk.ConfigError, "dropout_seed None; 3 integers of 64 bits are needed"),
        ({"dropout_p": 0.1, "dropout_seed": 5}, pk.ConfigError, "dropout_seed 5; 3 integers of 64 bits are needed"),
        ({"dropout_p": 0.1, "dropout_seed": [1, 2, 2**63]}, pk.ConfigError, "3 integers of 64 bits are needed"),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(2).long()}, pk.ConfigError, r"int64 \(3,\) is needed"),
        ({"dropout_rows": torch.zeros(9).long()}, pk.ConfigError, r"dropout_rows is \(9,\).*int64 \(10,\) is needed"),
        ({"dropout_rows": torch.zeros(10)}, pk.ConfigError, r"dropout_rows is \(10,\) torch.float32; int64"),
        ({"dropout_rows": torch.zeros(10, device="meta").long()}, pk.DeviceError, "dropout_rows is on meta, x on cpu"),
        ({"unselected": "dropped"}, pk.ConfigError, "unselected is 'dropped'"),
        ({"weight": torch.zeros(6, 7, requires_grad=True)}, pk.StateError, "the base is frozen"),
    ],
    ids=str,
)
def test_other_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call_with(**changes)


def test_a_mask_may_lie_the_other_way_round() -> None:
    mask = torch.rand(16, 3) < 0.5
    assert torch.equal(index_from_mask(mask.t()), index_from_mask(mask.t().contiguous()))
    assert index_from_mask(mask.t()).is_contiguous()
