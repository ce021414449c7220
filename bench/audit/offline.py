"""Compile kernels for GPUs that are absent: Triton gets the description of a device, and nothing is launched.

The operators run on tensors without storage. Triton's own binder specialises every argument (tensors, integers,
descriptors, tuples) as at run time, so what is compiled is what would run; no kernel has to be registered here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from plora_kernels.tuning.blocks import Hardware

# Tensors of this device have sizes and no storage.
NOWHERE = torch.device("meta")


@dataclass(frozen=True)
class Target:
    """A GPU architecture: Triton's backend and name for it, and `capability` as `plora_kernels` chooses blocks by.

    `multiprocessors` are those of a typical device, which persistent launches and row splits are sized to.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    capability: int
    multiprocessors: int

    @property
    def hardware(self) -> Hardware:
        """Return what blocks are chosen by."""
        return Hardware(self.capability, self.multiprocessors)


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 80, 108),
        Target("sm_90", "cuda", 90, 32, 90, 132),
        Target("sm_100", "cuda", 100, 32, 100, 148),
        Target("gfx942", "hip", "gfx942", 64, 0, 304),
    )
}


def refuse_interpreter() -> bool:
    """If Triton's interpreter is on, say on stderr that nothing would be compiled, and return True."""
    on = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if on:
        print("error: TRITON_INTERPRET is set, so nothing would be compiled; unset it", file=sys.stderr)
    return on


@dataclass(frozen=True)
class Launch:
    """A launch that was compiled but not run: the kernel's name and the compiler's result."""

    kernel: str
    compiled: Any
    num_warps: int


def _absent_device(target: Target) -> SimpleNamespace:
    """Return a replacement of Triton's driver that describes the target as if it were present."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget(target.backend, target.arch, target.warp_size),
        get_current_device=lambda: list(TARGETS).index(target.name),  # Triton keeps compiled kernels by device
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: NOWHERE,
    )


def _callers_of_runs_kernels() -> list[ModuleType]:
    """Return the modules that call `runs_kernels`, which refuses tensors without storage: it is replaced in each."""
    import plora_kernels

    loaded = [module for name, module in sys.modules.items() if name.startswith(f"{plora_kernels.__name__}.")]
    return [module for module in loaded if hasattr(module, "runs_kernels") and not module.__name__.endswith(".backend")]


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Launch]]:
    """Compile every launch for `target` instead of making it, and list them; operators take tensors on "meta".

    An error of the compiler gets the kernel's name as a note.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    import plora_kernels.tuning.lookup

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        try:
            compiled = run(self, *arguments, grid=grid, warmup=True, **named)
        except Exception as error:
            error.add_note(self.fn.__name__)
            raise
        launches.append(Launch(self.fn.__name__, compiled, compiled.metadata.num_warps))
        return compiled

    plora_kernels.tuning.lookup.forget_tables()
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        # With the backend named, a kernel that does not compile raises an error, and torch does not take its place.
        patches.enter_context(mock.patch.dict(os.environ, PLORA_BACKEND="triton"))
        for module in _callers_of_runs_kernels():
            patches.enter_context(mock.patch.object(module, "runs_kernels", return_value=True))
        for name, value in (("capability_of", target.capability), ("multiprocessors_of", target.multiprocessors)):
            patches.enter_context(mock.patch.object(plora_kernels.tuning.lookup, name, return_value=value))
        patches.enter_context(mock.patch.object(driver, "_active", _absent_device(target)))
        patches.callback(plora_kernels.tuning.lookup.forget_tables)
        yield launches
