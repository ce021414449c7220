"""What becomes of host memory that a training step has freed."""

from __future__ import annotations

import ctypes

# Of glibc's mallopt: how much free memory stays at the heap's end, and from which size on a block is mapped apart.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors, up to a GiB; say whether its C library can be told.

    By default glibc hands the end of its heap back to the system as soon as some of it is free, and the next step has
    every page mapped and cleared anew: a quarter of a small model's step, measured. It holds until the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc, whose allocators need no telling
        return False
    return bool(mallopt(MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES))
