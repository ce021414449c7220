"""What `plora_linear` says of arguments that do not fit."""

from __future__ import annotations

import pytest
import torch

import plora_kernels as pk

GOOD = {"x": (2, 7), "weight": (6, 7), "lora_A": (4, 7), "lora_B": (6, 4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora_A": (4, 8)}, pk.ShapeError, r"lora_A is \(4, 8\); weight \(N=6, K=7\) needs \(R, 7\)"),
        ({"lora_B": (6, 5)}, pk.ShapeError, r"lora_B is \(6, 5\); .*need \(6, 4\)"),
        ({"x": (2, 6)}, pk.ShapeError, r"x is \(2, 6\); weight \(N=6, K=7\) needs \(…, 7\)"),
        ({"weight": (6,)}, pk.ShapeError, r"weight is \(6,\); a matrix \(N, K\) is needed"),
        ({"lora_A": (0, 7), "lora_B": (6, 0)}, pk.RankError, "rank is 0; an integer from 1 to 256"),
        ({"lora_A": (257, 7), "lora_B": (6, 257)}, pk.RankError, "rank is 257; an integer from 1 to 256"),
    ],
)
def test_wrong_shapes_are_named(change: dict, error: type[Exception], message: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in (GOOD | change).items()}
    with pytest.raises(error, match=message):
        pk.plora_linear(**tensors)


@pytest.mark.parametrize(
    ("selected", "error", "message"),
    [
        ([4], pk.SelectionError, "selected holds module 4; rank 4 has modules 0 to 3"),
        ([-1], pk.SelectionError, "selected holds module -1"),
        ([1, 2, 1], pk.SelectionError, "selected names module 1 more than once"),
        ([True, False, True, True], pk.SelectionError, "selected holds the bool True"),
        (3, pk.SelectionError, "selected is 3; a list of module indices"),
        ([0.5], pk.SelectionError, "selected holds 0.5; module indices are integers"),
        (torch.ones(3, dtype=torch.bool), pk.ShapeError, r"the selection mask is \(3,\); rank 4 needs \(4,\)"),
        (torch.tensor(2), pk.SelectionError, "a list of module indices"),
    ],
    ids=str,
)
def test_wrong_selections_are_named(selected: object, error: type[Exception], message: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    with pytest.raises(error, match=message):
        pk.plora_linear(**tensors, selected=selected)  # type: ignore[arg-type]


def test_other_wrong_arguments_are_named() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    with pytest.raises(pk.DTypeError, match=r"weight is torch.float64, x is torch.float32"):
        pk.plora_linear(**tensors | {"weight": torch.zeros(6, 7, dtype=torch.float64)})
    with pytest.raises(pk.DTypeError, match=r"x is torch.int64; float16, bfloat16, float32 or float64"):
        pk.plora_linear(**{name: tensor.long() for name, tensor in tensors.items()})
    with pytest.raises(pk.DeviceError, match="lora_A is on meta, x on cpu"):
        pk.plora_linear(**tensors | {"lora_A": torch.zeros(4, 7, device="meta")})
    with pytest.raises(pk.ShapeError, match=r"bias is \(5,\).*needs \(6,\)"):
        pk.plora_linear(**tensors, bias=torch.zeros(5))
    with pytest.raises(pk.ConfigError, match="unselected is 'dropped'; it may be 'folded' or 'frozen'"):
        pk.plora_linear(**tensors, unselected="dropped")
    with pytest.raises(pk.StateError, match="the base is frozen"):
        pk.plora_linear(**tensors | {"weight": torch.zeros(6, 7, requires_grad=True)})
    with pytest.raises(pk.ConfigError, match="sign is 0; 1 folds and -1 takes out again"):
        pk.fold_(tensors["weight"], tensors["lora_A"], tensors["lora_B"], [], sign=0)
    for scale in (torch.tensor(1.0), float("nan"), "1"):
        with pytest.raises(pk.ConfigError, match="a finite number is needed"):
            pk.plora_linear(**tensors, scale=scale)  # type: ignore[arg-type]
    for p in (-0.1, 1.0, "0.1"):
        with pytest.raises(pk.ConfigError, match="dropout_p is"):
            pk.plora_linear(**tensors, dropout_p=p, dropout_seed=1)  # type: ignore[arg-type]
    for seed in (None, 1.0, 2**63, torch.zeros(2, dtype=torch.int64), torch.zeros(1)):
        with pytest.raises(pk.ConfigError, match="dropout_seed"):
            pk.plora_linear(**tensors, dropout_p=0.1, dropout_seed=seed)  # type: ignore[arg-type]
    with pytest.raises(pk.DeviceError, match="dropout_seed is on meta, x on cpu"):
        pk.plora_linear(**tensors, dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int64, device="meta"))
