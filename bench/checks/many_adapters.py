"""Checks of several adapters in one call on the present device: many over one weight, and many weights of one x."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from bench.checks.correctness import Results
from bench.checks.inputs import (
    DROPOUT_P,
    DROPOUT_SEED,
    SCALE,
    CheckShape,
    Inputs,
    assert_within_bound,
    by_operator,
    expected,
    fused_siblings,
)


def check_grouped(shape: CheckShape, inputs: Inputs, form: str) -> None:
    """Compare three groups, one without rows, with one call each; with "dropout" also masks, dropout and seeds."""
    drops = form.endswith("dropout")
    bounds = [0, shape.m // 3, shape.m // 3, shape.m]
    groups = [
        replace(
            inputs,
            x=inputs.x[first:last],
            dy=inputs.dy[first:last],
            A=inputs.A.roll(group, 1),
            B=inputs.B.roll(group, 0),
            mask=inputs.mask.roll(group),
        )
        for group, (first, last) in enumerate(itertools.pairwise(bounds))
    ]
    seeds = [DROPOUT_SEED + group for group in range(len(groups))]
    A, B, masks = (torch.stack([getattr(group, name) for group in groups]) for name in ("A", "B", "mask"))
    dropout = {"dropout_p": DROPOUT_P, "dropout_seed": seeds} if drops else {}
    results = by_operator(inputs, A, B, masks if drops else None, groups=bounds, **dropout)

    def alone(dtype: torch.dtype) -> Results:
        parts = [
            expected(group, dtype, group.mask if drops else None, "folded", DROPOUT_P if drops else 0.0, seed)
            for group, seed in zip(groups, seeds, strict=True)
        ]
        return {
            **{name: torch.cat([part[name] for part in parts]) for name in ("y", "dx")},
            **{name: torch.stack([part[name] for part in parts]) for name in ("dA", "dB")},
            "dbias": inputs.dy.to(dtype).sum(0),
        }

    assert_within_bound(shape, form, results, alone)


def check_siblings(shape: CheckShape, inputs: Inputs, form: str) -> None:
    """Compare three layers of one x, which `fuse_projections` computes in one launch, with plain torch for each."""
    bias = torch.zeros_like(inputs.bias)
    layers = [
        replace(
            inputs, bias=bias, weight=inputs.weight.roll(turn, 0), A=inputs.A.roll(turn, 1), B=inputs.B.roll(turn, 0)
        )
        for turn in range(3)
    ]
    weights = [layer.weight.clone() for layer in layers]
    siblings, fused = fused_siblings(weights, [(layer.A, layer.B) for layer in layers], SCALE)
    x = inputs.x.detach().requires_grad_()
    y = torch.cat(siblings(x), 1)
    factors = [factor for layer in fused for factor in (layer.lora_A, layer.lora_B)]
    d_x, *others = torch.autograd.grad(y, [x, *factors], torch.cat([inputs.dy] * len(layers), 1))
    results: Results = {"y": y.detach(), "dx": d_x, "dA": torch.stack(others[::2]), "dB": torch.stack(others[1::2])}

    def alone(dtype: torch.dtype) -> Results:
        parts = [expected(layer, dtype, None, "folded") for layer in layers]
        return {
            "y": torch.cat([part["y"] for part in parts], 1),
            "dx": torch.stack([part["dx"] for part in parts]).sum(0),
            **{name: torch.stack([part[name] for part in parts]) for name in ("dA", "dB")},
        }

    assert_within_bound(shape, form, results, alone)
