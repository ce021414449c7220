"""Which implementation runs, and what happens on a device where a kernel does not compile."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources

import plora_kernels as pk
from plora_kernels import folding, ops
from plora_kernels.kernels import adapted_matmul, fold, linear

backend = importlib.import_module("plora_kernels.backend")  # the package has a function of this name


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device that runs kernels, until one does not compile."""
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_given_up", given_up := set())
    for module in (ops.linear, ops.fold, folding):
        monkeypatch.setattr(module, "runs_kernels", lambda tensor: tensor.device not in given_up)


def broken(error: Exception) -> object:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    return fail


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(5, 7, requires_grad=True), torch.randn(6, 7), torch.randn(4, 7), torch.randn(6, 4)


ERRORS = (
    CompilationError(None, None, "no such type"),
    OutOfResources(300_000, 232_448, "shared memory"),
    RuntimeError("0 active drivers ([]). There should only be one."),
    RuntimeError("PassManager::run failed"),
    ImportError("no module"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_kernel_that_does_not_compile_gives_way_with_one_warning(
    error: Exception, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "forward", broken(error))
    x, weight, lora_A, lora_B = inputs()
    with pytest.warns(UserWarning, match=r"the Triton kernel of the forward does not compile on cpu: .*torch computes"):
        y = pk.plora_linear(x, weight, lora_A, lora_B)
    torch.testing.assert_close(y, x @ (weight + lora_B @ lora_A).T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.plora_linear(x, weight, lora_A, lora_B).sum().backward()
    assert backend._given_up == {torch.device("cpu")}


# NumPy's warning in Triton 3.6's interpreter, which `pytest.warns` reports again.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
def test_a_backward_that_does_not_compile_is_made_by_torch(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, lora_A, lora_B = inputs()
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    monkeypatch.setattr(linear, "factor_gradient_", broken(ERRORS[0]))
    lora_A.requires_grad_()
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    with pytest.warns(UserWarning, match="of the backward does not compile"):
        y.sum().backward()
    torch.testing.assert_close(lora_A.grad, lora_B.sum(0)[:, None] * x.detach().sum(0))


def test_a_fold_that_does_not_compile_is_made_by_torch(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight, lora_A, lora_B = inputs()
    monkeypatch.setattr(fold, "fold", broken(ERRORS[1]))
    expected = weight + lora_B @ lora_A
    with pytest.warns(UserWarning, match="of the fold does not compile on cpu: out of resource: shared memory"):
        pk.fold_(weight, lora_A, lora_B, [])
    torch.testing.assert_close(weight, expected)


def test_many_folds_are_each_done_once_whatever_compiles(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from plora_kernels.kernels import fold_many

    monkeypatch.setattr(fold_many, "_launch", broken(ERRORS[0]))
    singles, halves = [inputs()[1:] for _ in range(2)], [tuple(t.half() for t in inputs()[1:]) for _ in range(2)]
    alone = inputs()[1:]
    all_of_them = [*singles, *halves, (alone[0].t().contiguous().t(), *alone[1:])]
    expected = [(w.double() + B.double() @ A.double()).to(w.dtype) for w, A, B in all_of_them]
    with pytest.warns(UserWarning, match="of many folds does not compile"):
        pk.fold_many_([pk.Fold(*tensors, []) for tensors in all_of_them])
    torch.testing.assert_close([weight for weight, _, _ in all_of_them], expected)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("an illegal memory access was encountered"), InterpreterError("x"), ValueError("y")],
    ids=repr,
)
def test_what_goes_wrong_in_a_running_kernel_is_raised(
    error: Exception, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "adapted_matmul", broken(error))
    with pytest.raises(type(error)):
        pk.plora_linear(*inputs())
    assert backend._given_up == set()


def test_kernels_that_are_asked_for_do_not_give_way(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted_matmul, "tile_matmul", broken(ERRORS[0]))
    with pytest.raises(CompilationError):
        pk.plora_linear(*inputs())


def test_backend_names_what_runs_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_given_up", {torch.device("cuda", 1)})
    assert [pk.backend(f"cuda:{number}") for number in (0, 1)] == ["triton", "torch"]
    monkeypatch.setenv("PLORA_BACKEND", "triton")
    assert pk.backend("cuda:1") == "triton"


def test_backend_says_and_the_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    assert pk.backend("cpu") == "torch"
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    assert pk.backend("cuda") == "torch"
    monkeypatch.setenv("PLORA_BACKEND", "numpy")
    with pytest.raises(pk.ConfigError, match="PLORA_BACKEND is 'numpy'; it may be 'triton' or 'torch'"):
        pk.backend()
    monkeypatch.setenv("PLORA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(pk.ConfigError, match="the tensors are on cpu"):
        pk.backend("cpu")
