"""What is in memory now: torch's tensors, and all of the process at its fullest."""

import gc
import resource
import sys
import warnings
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def tensor_bytes() -> int:
    """Return the bytes of every tensor that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some libraries' objects deprecates them
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor):
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_process_bytes() -> int:
    """Return the most memory this process has had resident so far.

    From /proc where it is there: getrusage's figure starts from that of the process that started this one.
    """
    if STATUS.exists():
        peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
