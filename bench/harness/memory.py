"""Memory of torch: the peak of one call beyond what was allocated before it, and the bytes of all tensors."""

import gc
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the largest sum of bytes live during `run()` that were not live before it.

    CUDA: `max_memory_allocated` minus what was allocated at the start. CPU: the highest running sum of the
    allocations and frees of torch's CPU allocator, as torch's profiler records them. Both count tensors
    (results, saved activations, gradients, temporaries), compiled code's included; neither counts scratch
    space that a matmul library takes past torch's allocator.
    """
    if device.type != "cuda":
        return _cpu_peak_bytes(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak_bytes(run: Callable[[], object]) -> int:
    # Without acc_events torch 2.11 warns that it forgets earlier cycles; here there is only one.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        kept = run()
    del kept
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def tensor_bytes() -> int:
    """Return the bytes of every tensor that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # objects of some libraries warn about deprecation when they are inspected
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor):
                try:
                    storage = found.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
                except RuntimeError:  # a compiler's fake tensor, or a sparse one, which have no memory of this kind
                    continue
    return sum(storages.values())
