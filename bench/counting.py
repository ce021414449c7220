"""What a case must do at least: floating-point operations, and bytes through the device's memory."""

from bench.cases import BACKWARD, FOLDS, Case


def operations(case: Case, *, adapted: bool) -> int:
    """Return the floating-point operations of the mathematics, a multiply and an add as two.

    A forward: 2·M·N·K, adapted + 2·M·R·(P·K + N), where N is the sum of P projections' widths. With a backward dX as
    much again, and for the adapters dS, dS·A, dA and dB besides S and S·Bᵀ: 4·M·N·K + 6·M·R·(P·K + N). Folds: 2·N·K·R.
    Drawing dropout's mask is not counted.
    """
    m, k, n, r = case.m, case.projection.k, case.projection.n, case.r if adapted else 0
    if case.op in FOLDS:
        return 2 * n * k * r
    backward = case.op in BACKWARD
    return (2 if backward else 1) * 2 * m * n * k + (3 if backward else 1) * 2 * m * _factors(case, r)


def least_bytes(case: Case, *, adapted: bool) -> int:
    """Return the bytes moved when every operand is read once and every result written once.

    A forward: x, W, y, adapted A and B. With a backward also dY, W, dX and, adapted, x again, A, B, dA and dB.
    Folds: W read and the result written, adapted A and B.
    """
    m, k, n, r = case.m, case.projection.k, case.projection.n, case.r if adapted else 0
    factors = _factors(case, r)
    if case.op in FOLDS:
        elements = 2 * n * k + factors
    elif case.op in BACKWARD:
        elements = 2 * (m * k + n * k + m * n) + (m * k if adapted else 0) + 3 * factors
    else:
        elements = m * k + n * k + m * n + factors
    return elements * case.torch_dtype.itemsize


def _factors(case: Case, r: int) -> int:
    """Return how many numbers A (r, K) and B (N, r) of every projection hold."""
    return r * (case.projection.count * case.projection.k + case.projection.n)
