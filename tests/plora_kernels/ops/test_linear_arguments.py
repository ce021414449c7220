"""Arguments that `plora_linear` refuses, and the errors."""

from __future__ import annotations

import pytest
import torch

import plora_kernels as pk

GOOD = {"x": (2, 7), "weight": (6, 7), "lora_A": (4, 7), "lora_B": (6, 4)}
INTEGERS = {name: torch.zeros(shape).long() for name, shape in GOOD.items()}
AWAY = torch.zeros(1, device="meta").long()


def of_rank(rank: int) -> dict[str, torch.Tensor]:
    return {"lora_A": torch.zeros(rank, 7), "lora_B": torch.zeros(6, rank)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lora_A": torch.zeros(4, 8)}, pk.ShapeError, r"lora_A is \(4, 8\); weight \(N=6, K=7\) needs \(R, 7\)"),
        ({"lora_B": torch.zeros(6, 5)}, pk.ShapeError, r"lora_B is \(6, 5\); .*need \(6, 4\)"),
        ({"x": torch.zeros(2, 6)}, pk.ShapeError, r"x is \(2, 6\); weight \(N=6, K=7\) needs \(…, 7\)"),
        ({"weight": torch.zeros(6)}, pk.ShapeError, r"weight is \(6,\); a matrix \(N, K\) is needed"),
        (of_rank(0), pk.RankError, "rank is 0; an integer from 1 to 256"),
        (of_rank(257), pk.RankError, "rank is 257; an integer from 1 to 256"),
        ({"selected": [4]}, pk.SelectionError, "selected holds module 4; rank 4 has modules 0 to 3"),
        ({"selected": [-1]}, pk.SelectionError, "selected holds module -1"),
        ({"selected": [1, 2, 1]}, pk.SelectionError, "selected names module 1 more than once"),
        ({"selected": [True, False, True, True]}, pk.SelectionError, "selected holds the bool True"),
        ({"selected": 3}, pk.SelectionError, "selected is 3; a list of module indices"),
        ({"selected": [0.5]}, pk.SelectionError, "selected holds 0.5; module indices are integers"),
        ({"selected": torch.ones(3).bool()}, pk.ShapeError, r"the selection mask is \(3,\); rank 4 needs \(4,\)"),
        ({"selected": torch.tensor(2)}, pk.SelectionError, "a list of module indices"),
        ({"weight": torch.zeros(6, 7).double()}, pk.DTypeError, r"weight is torch.float64, x is torch.float32"),
        (INTEGERS, pk.DTypeError, r"x is torch.int64; float16, bfloat16, float32 or float64"),
        ({"lora_A": torch.zeros(4, 7, device="meta")}, pk.DeviceError, "lora_A is on meta, x on cpu"),
        ({"bias": torch.zeros(5)}, pk.ShapeError, r"bias is \(5,\).*needs \(6,\)"),
        ({"unselected": "dropped"}, pk.ConfigError, "unselected is 'dropped'; it may be 'folded' or 'frozen'"),
        ({"weight": torch.zeros(6, 7, requires_grad=True)}, pk.StateError, "the base is frozen"),
        *(({"scale": s}, pk.ConfigError, "a finite number is needed") for s in (torch.tensor(1.0), torch.nan, "1")),
        *(({"dropout_p": p, "dropout_seed": 1}, pk.ConfigError, "dropout_p is") for p in (-0.1, 1.0, "0.1")),
        *(
            ({"dropout_p": 0.1, "dropout_seed": seed}, pk.ConfigError, "dropout_seed")
            for seed in (None, 1.0, 2**63, torch.zeros(2).long(), torch.zeros(1))
        ),
        ({"dropout_p": 0.1, "dropout_seed": AWAY}, pk.DeviceError, "dropout_seed is on meta, x on cpu"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    with pytest.raises(error, match=message):
        pk.plora_linear(**tensors | changes)
