"""Compile every kernel for GPUs that need not be here, and read what came out.

`python -m bench.audit` runs the launchers on tensors without storage, records the launches they would make, compiles
each for the targets and prints registers, spills, shared memory and the matrix instructions used. It needs Triton and
the tools that ship inside it, no GPU and no driver; the interpreter must be off (TRITON_INTERPRET unset).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

# Shared memory one block may take, bytes (CUDA programming guide, compute capabilities table).
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the jitted function and the arguments it was given."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Row:
    """What one kernel became on one target."""

    kernel: str
    case: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    warpgroup_mma: bool
    mma: bool
    async_copy: bool


class _Recorder:
    """Stands in for a jitted kernel: `recorder[grid](…)` writes the call down instead of launching it."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*arguments: Any, num_warps: int, num_stages: int = 3, **named: Any) -> None:
            values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
            self.launches.append(Launch(self.kernel, values, num_warps, num_stages))

        return record


@contextmanager
def recording(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of every jitted kernel that is a global of `modules` instead of running them."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    replaced: list[tuple[ModuleType, str, Any]] = []
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                replaced.append((module, name, value))
                setattr(module, name, _Recorder(value, launches))
    try:
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def launches_of(
    rows: int, k: int, n: int, rank: int, dtype: torch.dtype, indexed: bool, capability: int
) -> list[Launch]:
    """Return every launch of one forward, one backward and the folds at this shape on sm_<capability>."""
    from plora_kernels import configs
    from plora_kernels.kernels import adapted_matmul, backward, factor_gradient, fold, forward

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    index = torch.empty(-(-rank // 16) * 16, dtype=torch.int32, device="meta") if indexed else None
    x, weight, dy = empty(rows, k), empty(n, k), empty(rows, n)
    lora_A, lora_B, bias = empty(rank, k), empty(n, rank), empty(n)
    configs.forget_tables()
    with (
        mock.patch.object(configs, "capability_of", return_value=capability),
        recording(adapted_matmul, factor_gradient, fold) as launches,
    ):
        _, s = forward.forward(x, weight, lora_A, lora_B, bias, index, 2.0, True)
        backward.backward(dy, x, weight, lora_A, lora_B, s, index, 2.0, False, True, True, True)
        fold.fold(weight, lora_A, lora_B, index, 2.0, None, weight)
        if dtype is not torch.float32:
            fold.fold(weight, lora_A, lora_B, index, 2.0, 1, empty(n, k))  # rounded stochastically, out of place
    return launches


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile one launch for sm_<capability> with the specialisations Triton would make at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    is_constexpr = {p.name: p.is_constexpr for p in launch.kernel.params}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if is_constexpr[name] or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump says of a kernel: REG (a thread), STACK and LOCAL (bytes a thread), …"""
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(cuobjdump), "--dump-resource-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    if set(usage) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump said nothing of registers or local memory: {report}")
    return usage


def audit_launch(launch: Launch, case: str, capability: int) -> Row:
    """Compile one launch and read the machine code's resource use and the PTX's instructions."""
    compiled = compile_launch(launch, capability)
    ptx, usage = compiled.asm["ptx"], _resource_usage(compiled.asm["cubin"])
    return Row(
        kernel=launch.kernel.__name__,
        case=case,
        target=f"sm_{capability}",
        registers=usage["REG"],
        # A register that does not fit is spilled to the stack, which lies in local memory; nothing else here uses it.
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        shared_limit_bytes=SHARED_LIMIT_BYTES[capability],
        warpgroup_mma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx or "wgmma.mma_async" in ptx,
        async_copy="cp.async" in ptx,
    )


# Rows, K, N, R, selection given as an index: the shapes users have, odd ones, a decode step.
CASES = (
    (8192, 4096, 4096, 16, False),
    (8192, 4096, 4096, 64, True),
    (8192, 2048, 8192, 32, False),
    (8192, 768, 768, 256, True),
    (8192, 1000, 1000, 16, True),
    (8192, 1001, 1001, 5, False),
    (8192, 4096, 4096, 5, False),
    (37, 50, 29, 5, False),
    (1, 4096, 4096, 16, False),
)


def audit(dtypes: tuple[torch.dtype, ...], capabilities: tuple[int, ...]) -> list[Row]:
    """Return a row for every launch of every case, dtype and target."""
    rows = []
    for dtype in dtypes:
        for m, k, n, rank, indexed in CASES:
            case = f"{str(dtype).removeprefix('torch.')} M{m} K{k} N{n} R{rank}{' indexed' if indexed else ''}"
            for capability in capabilities:
                for launch in launches_of(m, k, n, rank, dtype, indexed, capability):
                    rows.append(audit_launch(launch, case, capability))
                    print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return rows


def main() -> None:
    """Print the table, or write it as JSON."""
    # Triton 3.9 asks for a choice here; fused multiply-add is what it has always done.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], choices=sorted(SHARED_LIMIT_BYTES))
    options = parser.parse_args()
    rows = audit(tuple(getattr(torch, d) for d in options.dtypes), tuple(options.capabilities))
    if options.json:
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        temporary.replace(options.json)
    print(f"{'kernel':<24} {'case':<40} {'target':<7} {'regs':>4} {'spill':>5} {'shared':>7}  matrix instructions")
    for row in rows:
        instructions = "wgmma" if row.warpgroup_mma else "mma" if row.mma else "-"
        print(
            f"{row.kernel:<24} {row.case:<40} {row.target:<7} {row.registers:>4} {row.spill_bytes:>5} "
            f"{row.shared_bytes:>7}  {instructions}{' cp.async' if row.async_copy else ''}"
        )


if __name__ == "__main__":
    main()
