"""Checks of the operators on the present device, in every dtype, against fp64, before anything is timed.

Each check runs `plora_linear` forward and backward, or `fold_`, on new random inputs with outputs filled with NaN
first, and compares y, dx, dA, dB, dbias or the weight with the bound of `bench.checks.correctness`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import plora_kernels as pk
from bench.checks.correctness import Results, WrongResultError, poisoned_outputs
from bench.checks.inputs import (
    DROPOUT_P,
    DROPOUT_SEED,
    DTYPES,
    SCALE,
    CheckShape,
    Inputs,
    assert_within_bound,
    by_operator,
    draw,
    expected,
    frozen_linear,
    require_equal,
)
from bench.checks.many_adapters import check_grouped, check_siblings
from bench.harness.processes import note, one_line, require_device
from bench.harness.records import blank
from plora_kernels import reference
from plora_kernels.tuning.lookup import hardware_of, override_blocks

# M, K, N, R: those timed first, with just enough rows to fill every multiprocessor; a small one; a decode step.
GATE_SHAPES = {
    "cuda": ((2048, 4096, 4096, 16), (256, 512, 384, 16), (1, 1024, 1024, 16)),
    "cpu": ((37, 50, 29, 5),),
}
# Aligned and odd, one row, one of everything, ranks of every width, more tiles than multiprocessors.
SHAPES = {
    "cuda": (
        *GATE_SHAPES["cuda"],
        (37, 50, 29, 5),
        (1, 1, 1, 1),
        (16, 512, 1536, 64),
        (257, 1001, 513, 33),
        (300, 1000, 520, 128),
        (512, 512, 512, 256),
        (4100, 2048, 2048, 32),
    ),
    "cpu": (*GATE_SHAPES["cpu"], (1, 1, 1, 1)),
}


def check_shapes(device_type: str) -> tuple[CheckShape, ...]:
    """List what is checked on a device: every dtype it has, at every shape, bfloat16 first."""
    names = DTYPES if device_type == "cuda" else [name for name in DTYPES if name != "tf32"]
    return tuple(CheckShape(device_type, name, *shape) for name in names for shape in SHAPES[device_type])


def run_checks(shape: CheckShape, forms: Sequence[str] | None = None) -> list[dict[str, object]]:
    """Run every form of one shape, or some, and return a record for each; a failure is a record, not an exception.

    Each record is noted as it is made. Raises LostProcessError if the device does no more work after a form.
    """
    records = []
    for form, error in run_each_form(shape, forms):
        found: dict[str, object] = {"status": "passed"}
        if error is not None:
            found = {"status": "wrong", "cause": str(error) if isinstance(error, WrongResultError) else one_line(error)}
        records.append(check_record(shape, form) | found)
        note(records[-1])
    return records


def run_each_form(shape: CheckShape, forms: Sequence[str] | None = None) -> Iterator[tuple[str, Exception | None]]:
    """Run every form of one shape, or some, and yield its name and its error, or None if it is right."""
    inputs, matmul = draw(shape), torch.backends.cuda.matmul
    with _setting(lambda: matmul.allow_tf32, partial(setattr, matmul, "allow_tf32"), shape.dtype == "tf32"):
        for form in shape.forms() if forms is None else forms:
            try:
                for _ in range(2):  # the second call of a form replays what the first recorded
                    with poisoned_outputs():
                        check = _check_design if form.startswith("design ") else _CHECKS.get(form, _check_linear)
                        check(shape, inputs, form)
            except Exception as error:  # a kernel that does not compile counts as wrong
                require_device(shape.device, error)
                yield form, error
            else:
                yield form, None


def check_record(shape: CheckShape, form: str) -> dict[str, object]:
    """Return the record of one form of a shape, without its result."""
    facts = {name: value for name, value in asdict(shape).items() if name != "device"}
    return blank(op="check", form=form, provider="fused", device=shape.device, **facts)


@contextmanager
def _setting(read: Callable[[], Any], write: Callable[[Any], None], value: object) -> Iterator[None]:
    """Change a setting of torch, and restore it at the end."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _selection(form: str, mask: Tensor) -> tuple[Tensor | None, str]:
    """Return what a form selects, and how the others are held."""
    if form in ("all", "strided") or form.startswith("design"):
        return None, "folded"
    if form == "none selected":
        return torch.zeros_like(mask), "folded"
    return mask, "frozen" if form.startswith("frozen") else "folded"


def _fused(inputs: Inputs, mask: Tensor | None, unselected: str, dropout_p: float = 0.0) -> Results:
    """Return y and every gradient of ⟨y, dy⟩ by the operator."""
    seed = DROPOUT_SEED if dropout_p else None
    return by_operator(inputs, inputs.A, inputs.B, mask, unselected=unselected, dropout_p=dropout_p, dropout_seed=seed)


def _check_linear(shape: CheckShape, inputs: Inputs, form: str) -> None:
    mask, unselected = _selection(form, inputs.mask)
    given = inputs
    if form == "strided":  # every second column of a wider x, the transpose of a transposed weight
        x = torch.stack([inputs.x, inputs.x], dim=-1).flatten(1)[:, ::2]
        given = replace(inputs, x=x, weight=inputs.weight.t().contiguous().t())
    dropout_p = DROPOUT_P if form.endswith("dropout") else 0.0
    found = _fused(given, mask, unselected, dropout_p)
    assert_within_bound(shape, form, found, lambda dtype: expected(inputs, dtype, mask, unselected, dropout_p))


def _check_design(shape: CheckShape, inputs: Inputs, form: str) -> None:
    with override_blocks(shape.blocks(form.removeprefix("design "), hardware_of(inputs.x.device))):
        _check_linear(shape, inputs, form)


def _check_fold(shape: CheckShape, inputs: Inputs, form: str) -> None:
    def wanted(dtype: torch.dtype) -> Results:
        # float32 factors enter the sum as they are, and the weight is rounded once.
        wide = shape.factors if dtype is inputs.weight.dtype else dtype
        weight, A, B = (tensor.to(wide) for tensor in (inputs.weight, inputs.A, inputs.B))
        return {"weight": reference.fold(weight, A, B, inputs.mask, scale=SCALE).to(dtype)}

    # The mask is on the host, so that the number of modules is known without synchronising.
    folded = pk.fold_(inputs.weight.clone(), inputs.A, inputs.B, inputs.mask, scale=SCALE)
    assert_within_bound(shape, form, {"weight": folded}, wanted)


def _check_folds_agree(shape: CheckShape, inputs: Inputs, form: str) -> None:
    """Check that a fold gives the same bits in place, out of place and together with another weight."""
    factors = (inputs.A, inputs.B, inputs.mask)
    in_place = pk.fold_(inputs.weight.clone(), *factors, scale=SCALE)
    out_of_place = pk.fold(inputs.weight, *factors, scale=SCALE)
    many = [inputs.weight.clone(), inputs.weight.clone()]
    pk.fold_many_([pk.Fold(weight, *factors, scale=SCALE) for weight in many])
    for other in (out_of_place, *many):
        require_equal(form, {"weight": in_place}, {"weight": other})


def _check_deterministic(shape: CheckShape, inputs: Inputs, form: str) -> None:
    first, second = (_fused(inputs, None, "folded") for _ in range(2))
    require_equal(form, first, second)


def _check_replayed(shape: CheckShape, inputs: Inputs, form: str) -> None:
    """Compare a second call of one form, on other inputs, with float64: it replays the launches of the first."""
    _fused(inputs, None, "folded")
    other = replace(inputs, x=-inputs.x.flip(0).contiguous(), dy=inputs.dy.flip(0).contiguous())
    found = _fused(other, None, "folded")
    assert_within_bound(shape, form, found, lambda dtype: expected(other, dtype, None, "folded"))


def _check_replay(shape: CheckShape, inputs: Inputs, form: str) -> None:
    """Capture forward and backward in a CUDA graph, replay it on other inputs and compare with plain calls."""
    static = Inputs(**{name: tensor.clone() for name, tensor in vars(inputs).items()})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _fused(static, None, "folded")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _fused(static, None, "folded")
    for sign in (1, -1):  # twice, because a replay may leave state that makes the next one wrong
        static.x.copy_(inputs.x * sign)
        static.dy.copy_(inputs.dy * sign)
        graph.replay()
        require_equal(form, captured, _fused(static, None, "folded"))


def _check_no_synchronisation(shape: CheckShape, inputs: Inputs, form: str) -> None:
    """Run forward, backward and a layer's select with synchronising calls refused."""
    linear = frozen_linear(inputs.weight.clone())
    layer = pk.FusedPLoRALinear.from_linear(linear, rank=shape.r, adapter_dtype=inputs.A.dtype)
    layer.set_factors(inputs.A, inputs.B)
    _fused(inputs, None, "folded")
    refused = _setting(torch.cuda.get_sync_debug_mode, torch.cuda.set_sync_debug_mode, "error")
    with refused if inputs.x.is_cuda else nullcontext():
        _fused(inputs, inputs.mask.to(inputs.x.device, non_blocking=True), "folded")
        layer.select([0])
        layer(inputs.x).backward(inputs.dy)


# Forms with a check of their own; all others are checked as a layer.
_CHECKS: Mapping[str, Callable[[CheckShape, Inputs, str], None]] = {
    "fold": _check_fold,
    "folds agree": _check_folds_agree,
    "deterministic": _check_deterministic,
    "replayed": _check_replayed,
    "graph replay": _check_replay,
    "no synchronisation": _check_no_synchronisation,
    "grouped": check_grouped,
    "grouped mask dropout": check_grouped,
    "siblings": check_siblings,
}
