"""The shape classes that `python -m bench.tune` finds blocks for, and the layers that they belong to."""

from bench.gpu_cases import DECODE_ROWS, SHARED_INPUTS, TABLE, TABLE_RANKS, TABLE_ROWS
from plora_kernels.tuning.blocks import ShapeClass

OTHER_RANKS, FEW_ROWS = (128, 256, 32), (512, 2048)


def layer_classes(m: int, k: int, n: int, r: int, dtype: str) -> list[ShapeClass]:
    """Return the classes of one layer: first the skinny products, which the designs of the others use."""
    return [
        ShapeClass("side_product", dtype, m, k, r, r),
        ShapeClass("output_gradient", dtype, m, n, r, r),
        *(ShapeClass("factor_gradient", dtype, m, d, r, r) for d in dict.fromkeys((k, n))),
        ShapeClass("forward", dtype, m, k, n, r),
        ShapeClass("input_gradient", dtype, m, n, k, r),
    ]


def projection_classes(m: int, k: int, total: int, r: int, dtype: str) -> list[ShapeClass]:
    """Return the classes of layers that share their input and have `total` outputs together."""
    return [
        ShapeClass("projections_forward", dtype, m, k, total, r),
        ShapeClass("projections_input_gradient", dtype, m, total, k, r),
    ]


def shape_classes(device_type: str) -> list[ShapeClass]:
    """List what is tuned, the most important first, each once; on a CPU one tiny layer that tries everything."""
    if device_type != "cuda":
        fold = ShapeClass("fold", "float32", 48, 64, 48, 16)
        return [*layer_classes(32, 64, 48, 16, "float32"), fold, *projection_classes(32, 64, 96, 16, "float32")]
    gate, *others = TABLE
    found = layer_classes(TABLE_ROWS, gate.k, gate.n, 16, "bfloat16")
    found += [ShapeClass("fold", "bfloat16", gate.n, gate.k, gate.n, r) for r in (16, 64, 256)]
    found += layer_classes(TABLE_ROWS, gate.k, gate.n, 64, "bfloat16")
    for m in FEW_ROWS:
        found += layer_classes(m, gate.k, gate.n, 16, "bfloat16")
    for projection in others:
        found += layer_classes(TABLE_ROWS, projection.k, projection.n, 16, "bfloat16")
    for r in OTHER_RANKS:
        found += layer_classes(TABLE_ROWS, gate.k, gate.n, r, "bfloat16")
    found += [ShapeClass("forward", "bfloat16", m, p.k, p.n, 16) for m in DECODE_ROWS for p in TABLE[:3]]
    for r in TABLE_RANKS[1:]:
        for projection in others:
            found += layer_classes(TABLE_ROWS, projection.k, projection.n, r, "bfloat16")
    found += [ShapeClass("fold", "bfloat16", p.n, p.k, p.n, 16) for p in others]
    for shared in SHARED_INPUTS:
        found += projection_classes(TABLE_ROWS, shared.k, shared.n, 16, "bfloat16")
    first = SHARED_INPUTS[0]
    found += [ShapeClass("projections_forward", "bfloat16", m, first.k, first.n, 16) for m in DECODE_ROWS]
    for dtype in ("float16", "float32"):
        found += layer_classes(TABLE_ROWS, gate.k, gate.n, 16, dtype)
        found.append(ShapeClass("fold", dtype, gate.n, gate.k, gate.n, 16))
    return list(dict.fromkeys(found))


def belongs(shape: ShapeClass, k: int, n: int) -> bool:
    """Say whether a layer from k to n features has launches of a class: its products, and its skinny ones."""
    skinny = shape.op in ("side_product", "output_gradient", "factor_gradient")
    return shape.d_in in (k, n) if skinny else (shape.d_in, shape.d_out) in ((k, n), (n, k))
