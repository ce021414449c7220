"""The cases of `python -m bench.gpu` in order of importance, because a run may be interrupted."""

from bench.cases import FOLDS, GATE_UP, MIXED_OPS, OPS, PROJECTIONS, QKV, QKVO, Case, Op, Projection, cases, several

# Square and feed-forward projections of Llama 3.2 1B and Llama 3.1 8B: the shapes the kernels are designed for.
TABLE = tuple(
    projection
    for name in (("llama-8b", "query"), ("llama-1b", "query"), ("llama-8b", "up"), ("llama-8b", "down"))
    for projection in PROJECTIONS
    if (projection.model, projection.name) == name
)
GATE, TABLE_ROWS, TABLE_RANKS = TABLE[0], 8192, (16, 32, 64)
OTHER_RANKS, OTHER_ROWS = (8, 128, 256), (2048, 512)
DECODE_ROWS = (1, 16)
# Projections of one input: q, k and v of Llama 3.1 8B, gate and up and then q, k and v of Llama 3.2 1B.
SHARED_INPUTS = (QKV[2], GATE_UP, QKV[1])
TINY = Projection("tiny", "query", 64, 48)
TINY_SEVERAL = several("tiny", "q, k, v", 64, 48, 16, 16)
LINEAR: tuple[Op, ...] = ("forward", "forward_backward")
# Calls whose kernels `bench.timeline` profiles.
TIMELINE_CASES = tuple(Case(op, GATE, TABLE_ROWS, 16, "bfloat16") for op in (*LINEAR, "dropout"))


def device_cases(device_type: str) -> tuple[Case, ...]:
    """List a device's cases in order of importance, each once; on the CPU a few tiny ones that try everything."""
    if device_type != "cuda":
        return _tiny_cases()
    found = list(TIMELINE_CASES)
    found += [Case("fold", projection, 0, 16, "bfloat16") for projection in TABLE]
    found += [Case(op, projection, TABLE_ROWS, 16, "bfloat16") for projection in TABLE for op in MIXED_OPS]
    for r in TABLE_RANKS:
        found += [Case(op, projection, TABLE_ROWS, r, "bfloat16") for projection in TABLE for op in LINEAR]
    found += [Case("forward", projection, m, 16, "bfloat16") for m in DECODE_ROWS for projection in TABLE[:3]]
    found += _beyond_one_pass()
    found += [Case(op, GATE, TABLE_ROWS, r, "bfloat16") for r in OTHER_RANKS for op in LINEAR]
    found += [Case(op, GATE, m, 16, "bfloat16") for m in OTHER_ROWS for op in LINEAR]
    found += [Case("fold", GATE, 0, r, "bfloat16") for r in (64, 256)]
    found += [Case(op, GATE, TABLE_ROWS, 16, dtype) for dtype in ("float16", "float32") for op in LINEAR]
    found += cases(device_type)
    return tuple(dict.fromkeys(found))


def _beyond_one_pass() -> list[Case]:
    """List projections of one input and the other forms of folds, at the shapes that use them."""
    found: list[Case] = []
    for projection in SHARED_INPUTS:
        found += [Case(op, projection, TABLE_ROWS, 16, "bfloat16") for op in ("projections", "projections_forward")]
    found += [Case("projections_forward", SHARED_INPUTS[0], m, 16, "bfloat16") for m in DECODE_ROWS]
    found += [Case("fold_out", GATE, 0, 16, "bfloat16"), Case("fold_many", QKVO[2], 0, 16, "bfloat16")]
    return found


def _tiny_cases() -> tuple[Case, ...]:
    """List one small case of every op, and a decode step."""
    over_several: tuple[Op, ...] = ("projections", "projections_forward", "fold_many")
    small = [
        Case(op, TINY_SEVERAL if op in over_several else TINY, 0 if op in FOLDS else 32, 4, "float32")
        for op in OPS
        if op not in MIXED_OPS
    ]
    small += [Case(op, TINY, 32, 4, "bfloat16") for op in MIXED_OPS]
    return (*small, Case("forward", TINY, 1, 4, "bfloat16"))
