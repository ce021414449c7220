"""What `python -m bench.gpu` times and in which order: what matters most stands first, for a run may be cut."""

from bench.cases import PROJECTIONS, Case, Op, Projection, cases

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
TINY = Projection("tiny", "query", 64, 48)
LINEAR: tuple[Op, ...] = ("forward", "forward_backward")


def device_cases(device_type: str) -> tuple[Case, ...]:
    """List a device's cases in order of importance, each once; on the CPU a few tiny ones that try everything."""
    if device_type != "cuda":
        small = [Case(op, TINY, 0 if op == "fold" else 32, 4, "float32") for op in (*LINEAR, "fold")]
        return (*small, Case("forward", TINY, 1, 4, "bfloat16"))
    found = [Case(op, GATE, TABLE_ROWS, 16, "bfloat16") for op in LINEAR]
    found += [Case("fold", projection, 0, 16, "bfloat16") for projection in TABLE]
    for r in TABLE_RANKS:
        found += [Case(op, projection, TABLE_ROWS, r, "bfloat16") for projection in TABLE for op in LINEAR]
    found += [Case("forward", projection, m, 16, "bfloat16") for m in DECODE_ROWS for projection in TABLE[:3]]
    found += [Case(op, GATE, TABLE_ROWS, r, "bfloat16") for r in OTHER_RANKS for op in LINEAR]
    found += [Case(op, GATE, m, 16, "bfloat16") for m in OTHER_ROWS for op in LINEAR]
    found += [Case("fold", GATE, 0, r, "bfloat16") for r in (64, 256)]
    found += [Case(op, GATE, TABLE_ROWS, 16, dtype) for dtype in ("float16", "float32") for op in LINEAR]
    found += cases(device_type)
    return tuple(dict.fromkeys(found))
