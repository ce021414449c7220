"""Settings every test runs under. They must stand before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.9 requires this setting; earlier versions always used fused multiply-add.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Flower reads these when it is imported or started; tests reach no network.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

from plora_kernels.tuning.lookup import forget_tables
from tests.support.notes import note_calls


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to run with another Triton than `--triton` names, because several may be on the path."""
    wanted = session.config.getoption("triton")
    if wanted is None:
        return
    import triton

    if triton.__version__ != wanted:
        raise pytest.UsageError(f"--triton {wanted}: found {triton.__version__} at {triton.__file__}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, without the launches that other tests recorded."""
    torch.manual_seed(0)
    forget_tables()


@pytest.fixture(params=["torch", "triton"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on the torch path and on the kernels (interpreted where there is no GPU)."""
    monkeypatch.setenv("PLORA_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test on the Triton kernels (interpreted where there is no GPU)."""
    monkeypatch.setenv("PLORA_BACKEND", "triton")


@pytest.fixture
def without_group_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute no weight for each group, so that small layers also run this library's operators, not torch's."""
    from plora_kernels.fallback import grouped_products

    monkeypatch.setattr(grouped_products, "group_weights_are_cheaper", lambda *_: False)


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and `empty_like` return with NaN, so that an element that is never written shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*arguments: object, make: object = make, **named: object) -> torch.Tensor:
            tensor = make(*arguments, **named)  # type: ignore[operator]
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of projections of every joint forward."""
    from plora_kernels.nn import shared_input

    return note_calls(monkeypatch, shared_input, "forward", lambda x, operands, keep_s: len(operands))
