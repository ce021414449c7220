"""What a case must do at least: floating-point operations, and bytes through the device's memory."""

from bench.cases import Case


def operations(case: Case, *, adapted: bool) -> int:
    """Return the floating-point operations of the mathematics, a multiply and an add as two.

    forward: 2·M·N·K, adapted + 2·M·R·(K + N). forward_backward: dX as much again, and for the adapter dS, dS·A, dA
    and dB besides S and S·Bᵀ: 4·M·N·K + 6·M·R·(K + N). fold: 2·N·K·R.
    """
    m, k, n, r = case.m, case.projection.k, case.projection.n, case.r if adapted else 0
    if case.op == "fold":
        return 2 * n * k * r
    passes = 2 if case.op == "forward_backward" else 1
    return passes * 2 * m * n * k + (3 if passes == 2 else 1) * 2 * m * r * (k + n)


def least_bytes(case: Case, *, adapted: bool) -> int:
    """Return the bytes moved when every operand is read once and every result written once.

    forward: x, W, y, adapted A and B. forward_backward: also dY, W, dX and, adapted, x again, A, B, dA and dB.
    fold: W read and written, adapted A and B.
    """
    m, k, n, r = case.m, case.projection.k, case.projection.n, case.r if adapted else 0
    factors = r * (k + n)
    if case.op == "fold":
        elements = 2 * n * k + factors
    elif case.op == "forward":
        elements = m * k + n * k + m * n + factors
    else:
        elements = 2 * (m * k + n * k + m * n) + (m * k if adapted else 0) + 3 * factors
    return elements * case.torch_dtype.itemsize
