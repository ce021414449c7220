"""Stochastic rounding inside a kernel: bit for bit what `plora_kernels.rounding` does in torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_stochastically(values, bits, dtype: tl.constexpr):
    """Return fp32 values in `dtype` (fp16 or bf16), rounded up or down by their words (uint32, `hashing`)."""
    words = values.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((words + (bits >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = (words + (bits >> 19)) & 0xFFFFE000
        # Below 2⁻¹⁴ float16's spacing stays 2⁻²⁴, whatever the exponent.
        steps = tl.abs(values) * 16777216.0
        whole = tl.floor(steps)
        up = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 < steps - whole
        small = (whole + up.to(tl.float32)) * 5.9604644775390625e-08
        small = small.to(tl.uint32, bitcast=True) | (words & 0x80000000)
        rounded = tl.where(steps < 1024.0, small, rounded).to(tl.float32, bitcast=True)
    largest: tl.constexpr = 3.3895313892515355e38 if dtype == tl.bfloat16 else 65504.0
    # What overflows, infinities and NaN become what rounding to nearest makes of them.
    return tl.where(tl.abs(values) <= largest, rounded, values).to(dtype)
