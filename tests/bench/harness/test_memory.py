"""Peak bytes of calls whose allocations are known."""

import torch
from torch import Tensor

from bench.harness.memory import peak_bytes

CPU = torch.device("cpu")
MIB = 2**20


def block(mib: int) -> Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_what_is_returned_counts() -> None:
    assert peak_bytes(lambda: block(3), CPU) == 3 * MIB


def test_the_peak_is_what_lives_together_not_the_sum() -> None:
    def run() -> None:
        first = block(4)
        del first
        second, third = block(2), block(1)
        del second, third

    assert peak_bytes(run, CPU) == 4 * MIB


def test_what_lived_before_does_not_count() -> None:
    held = [block(5)]

    def run() -> Tensor:
        held.clear()
        return block(1)

    assert peak_bytes(run, CPU) <= MIB


def test_a_call_that_allocates_nothing_has_no_peak() -> None:
    x = torch.ones(8)
    assert peak_bytes(lambda: x.zero_(), CPU) == 0


def test_saved_activations_count() -> None:
    x = torch.ones(MIB, dtype=torch.float32, requires_grad=True)  # 4 MiB
    assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 12 * MIB  # exp keeps its result for the backward
    with torch.no_grad():
        assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 8 * MIB
