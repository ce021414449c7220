"""The registers and memory of a compiled kernel, read from its machine code, and its occupancy."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The resources of one multiprocessor (or compute unit): registers, shared memory, warps and blocks.

    `registers` are 32-bit ones of one of its four partitions and one lane; a warp takes them in steps of
    `register_step` a lane. A block takes `reserved_bytes` of shared memory beyond its own.
    """

    shared_bytes: int
    shared_bytes_a_block: int
    reserved_bytes: int
    registers: int
    register_step: int
    warps: int
    blocks: int


# CUDA C++ Programming Guide, "Compute Capabilities": 64 K registers, 64 warps and 32 blocks a multiprocessor.
# AMD Instinct MI300 ISA and the HIP performance guide: 4 SIMDs of 512 registers a lane and 8 waves, 64 KiB of LDS.
LIMITS = {
    "sm_80": Limits(164 * 1024, 163 * 1024, 1024, 512, 8, 64, 32),
    "sm_90": Limits(228 * 1024, 227 * 1024, 1024, 512, 8, 64, 32),
    "sm_100": Limits(228 * 1024, 227 * 1024, 1024, 512, 8, 64, 32),
    "gfx942": Limits(64 * 1024, 64 * 1024, 0, 512, 8, 32, 32),
}
PARTITIONS = 4


@dataclass(frozen=True)
class Usage:
    """Registers per lane, bytes that a thread spills to memory, shared memory of a block."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def resident_blocks(usage: Usage, num_warps: int, limits: Limits) -> int:
    """Return the blocks that fit on a multiprocessor at a time, an estimate of its occupancy.

    min(blocks, warps / num_warps, shared / (block's + reserved), 4·⌊registers / rounded up a lane⌋ / num_warps), each
    rounded down: warps are distributed over four partitions with their own registers.
    """
    held = max(usage.registers, 1)
    held = -(-held // limits.register_step) * limits.register_step
    by_registers = PARTITIONS * min(limits.warps // PARTITIONS, limits.registers // held) // num_warps
    by_shared = limits.shared_bytes // max(usage.shared_bytes + limits.reserved_bytes, 1)
    return min(limits.blocks, limits.warps // num_warps, by_registers, by_shared)


def usage_of(compiled: Any) -> Usage:
    """Read the usage of a kernel that Triton compiled from its cubin or its amdgcn text."""
    shared_bytes = compiled.metadata.shared
    if "cubin" in compiled.asm:
        found = _cubin_usage(compiled.asm["cubin"])
        # Registers that do not fit are spilled to the stack, in local memory; these kernels use it for nothing else.
        return Usage(found["REG"], found["STACK"] + found["LOCAL"], shared_bytes)
    text = compiled.asm["amdgcn"]
    return Usage(_amdgcn(text, "vgpr_count"), _amdgcn(text, "private_segment_fixed_size"), shared_bytes)


def instructions_of(compiled: Any) -> tuple[str, ...]:
    """Name the matrix and copy instructions a kernel uses, as its PTX or amdgcn text spells them."""
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    marks = {
        "wgmma": "wgmma.mma_async",
        "tcgen05": "tcgen05.mma",
        "mma": "mma.sync",
        "mfma": "v_mfma",
        "tma": "cp.async.bulk.tensor",
        "cp.async": "cp.async.cg",
    }
    return tuple(name for name, mark in marks.items() if mark in text)


def is_trap(compiled: Any) -> bool:
    """Say whether a kernel is only a trap: Triton compiles one that overflows the matrix units' memory to that.

    It looks compiled, with few registers and no spill, but launching it destroys the process's CUDA context.
    """
    return re.search(r"^\s*trap;", compiled.asm.get("ptx") or "", re.MULTILINE) is not None


def _amdgcn(text: str, name: str) -> int:
    """Return one number of the kernel's metadata at the end of the assembly."""
    found = re.findall(rf"^\s*-?\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
    if len(found) != 1:
        raise RuntimeError(f"the amdgcn text holds {len(found)} times .{name}; one kernel's metadata was expected")
    return int(found[0])


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump reads from a kernel: REG (a thread), STACK and LOCAL (bytes a thread)."""
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
