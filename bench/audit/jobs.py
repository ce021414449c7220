"""Compiling all launches of a shape for one target: the list of jobs, and the rows that they give."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import plora_kernels as pk
from bench.audit.machine_code import LIMITS, instructions_of, is_trap, resident_blocks, usage_of
from bench.audit.offline import NOWHERE, Launch, Target, compiling_for
from bench.checks.designs import Shape, design_ways
from bench.harness.machine import settle_compilers
from bench.harness.processes import one_line, outcomes
from plora_kernels.functional import grouped_product
from plora_kernels.nn.quantized.product import FEW_ROWS
from plora_kernels.ops.side_branch import add_side_branch_
from plora_kernels.tuning.blocks import DESIGNS, KERNEL_DESIGNS, LAYER_OPS, PROJECTION_OPS, Blocks, ShapeClass
from plora_kernels.tuning.lookup import override_blocks
from plora_kernels.tuning.tables import PACKAGED, load_table

DTYPES = ("bfloat16", "float16", "float32")
HALF = DTYPES[:2]
# How long one job may take; it compiles some ten kernels.
SECONDS_EACH = 900.0


# Shapes of common models, odd shapes, one whose x has unaligned rows beside a wide output, a decode step.
SHAPES = (
    Shape(8192, 4096, 4096, 16),
    Shape(8192, 1001, 1001, 5),
    Shape(8192, 768, 768, 256, indexed=True),
    Shape(8192, 4096, 4096, 64, indexed=True),
    Shape(8192, 2048, 8192, 32),
    Shape(8192, 1000, 1000, 16, indexed=True),
    Shape(8192, 4096, 4096, 5),
    Shape(512, 4096, 1024, 16),
    Shape(37, 50, 29, 5),
    Shape(512, 1001, 4096, 16),
    Shape(1, 4096, 4096, 16),
)
DESIGN_SHAPES = (Shape(8192, 4096, 4096, 16), Shape(8192, 4096, 4096, 64, indexed=True))
# What is compiled with float32 factors too: the usual one, unaligned rows, several and many blocks of modules, x alone
# unaligned, a decode step.
MIXED_SHAPES = (
    Shape(8192, 4096, 4096, 16),
    Shape(8192, 1001, 1001, 5),
    Shape(8192, 4096, 4096, 64, indexed=True),
    Shape(8192, 768, 768, 256, indexed=True),
    Shape(512, 1001, 4096, 16),
    Shape(1, 4096, 4096, 16),
)
# Kernels that load factors, and so have other machine code for float32 factors.
LOADING_FACTORS = (*LAYER_OPS, *PROJECTION_OPS, "side_product", "output_gradient", "fold")


@dataclass(frozen=True)
class Row:
    """The figures of one kernel on one target, or the `error` if it does not compile.

    `code` is a digest of the machine code. A `candidate` is neither a default nor in a table, so no launch uses it yet,
    and it may spill.
    """

    kernel: str
    case: str
    target: str
    code: str = ""
    candidate: bool = False
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    shared_limit_bytes: int = 0
    blocks_resident: int = 0
    instructions: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """One compilation of everything a shape launches, with the blocks of a design or of a table's entry.

    If `mixed`, the factors are float32 beside a half-precision `dtype`.
    """

    shape: Shape
    dtype: str
    target: Target
    name: str = ""
    blocks: tuple[tuple[str, Blocks], ...] = ()
    candidate: bool = False
    mixed: bool = False

    @property
    def case(self) -> str:
        """Return a description of the job."""
        shape = self.shape
        words = [
            self.dtype,
            *(["mixed"] if self.mixed else []),
            f"M{shape.m}",
            f"K{shape.k}",
            f"N{shape.n}",
            f"R{shape.r}",
        ]
        return " ".join([*words, *(["indexed"] if shape.indexed else []), *([self.name] if self.name else [])])


def run_shape(shape: Shape, dtype: torch.dtype, factors: torch.dtype) -> None:
    """Call every operator once on tensors without storage: a forward, its backward, the folds.

    `factors` is the dtype of A and B, here and in the functions below.
    """
    empty = partial(torch.empty, dtype=dtype, device=NOWHERE)
    x, weight, bias = empty(shape.m, shape.k), empty(shape.n, shape.k), empty(shape.n)
    lora_A, lora_B = empty(shape.r, shape.k, dtype=factors), empty(shape.n, shape.r, dtype=factors)
    selected = list(range(shape.r)) if shape.indexed else None
    leaves = [tensor.requires_grad_() for tensor in (x, lora_A, lora_B)]
    y = pk.plora_linear(x, weight, lora_A, lora_B, selected, bias=bias, scale=2.0)
    torch.autograd.grad(y, leaves, empty(shape.m, shape.n))
    if shape.m <= FEW_ROWS:
        with torch.no_grad():
            branch = empty(shape.m, shape.n), x, lora_A, lora_B
            add_side_branch_(*branch, None, 2.0, True, True, 0.0, None)
            add_side_branch_(*branch, None, 2.0, True, False, 0.1, torch.empty(1, dtype=torch.int64, device=NOWHERE))
    form = "frozen" if shape.indexed else "folded"
    y = pk.plora_linear(x, weight, lora_A, lora_B, selected, unselected=form, dropout_p=0.1, dropout_seed=1)
    torch.autograd.grad(y, leaves, empty(shape.m, shape.n))
    with torch.no_grad():
        kept = [0] if shape.indexed and shape.r > 1 else []
        pk.fold_(weight, lora_A, lora_B, kept, scale=2.0)
        if dtype is not torch.float32:
            pk.fold(weight, lora_A, lora_B, kept, scale=2.0, rounding="stochastic", seed=1)
        pk.fold_many_([pk.Fold(weight, lora_A, lora_B, kept, 2.0, out=empty(shape.n, shape.k)) for _ in range(2)])


def run_groups(shape: Shape, dtype: torch.dtype, factors: torch.dtype) -> None:
    """Call the grouped form on four groups of the shape's rows and differentiate it, without dropout and with it.

    Then with a weight and a bias for each group, stored in both ways, and so without modules.
    """
    empty = partial(torch.empty, dtype=dtype, device=NOWHERE)
    of_factors = ((4, shape.r, shape.k), (4, shape.n, shape.r))
    leaves = [empty(shape.m, shape.k), *(empty(*size, dtype=factors) for size in of_factors)]
    for leaf in leaves:
        leaf.requires_grad_()
    offsets, seeds = (empty(size, dtype=torch.int64) for size in (5, 4))
    selected = [list(range(shape.r - 1))] * 4 if shape.indexed else None
    form: dict[str, Any] = {"bias": empty(shape.n), "groups": offsets, "dropout_seed": seeds, "selected": selected}
    numbers = empty(shape.m, dtype=torch.int64)
    for unselected, p, rows in (("folded", 0.0, None), ("frozen", 0.1, None), ("frozen", 0.1, numbers)):
        form |= {"unselected": unselected, "dropout_p": p, "dropout_rows": rows}
        y = pk.plora_linear(leaves[0], empty(shape.n, shape.k), *leaves[1:], **form)
        torch.autograd.grad(y, leaves, torch.empty_like(y))
    bias = empty(4, shape.n).requires_grad_()
    form |= {"bias": bias, "unselected": "folded", "dropout_p": 0.0, "dropout_rows": None}
    for weight in (empty(4, shape.n, shape.k), empty(4, shape.k, shape.n).mT):
        y = pk.plora_linear(leaves[0], weight, *leaves[1:], **form)
        torch.autograd.grad(y, [*leaves, bias], torch.empty_like(y))
        y = grouped_product(leaves[0], weight, offsets, bias.detach())
        torch.autograd.grad(y, leaves[0], torch.empty_like(y))


def run_projections(shape: Shape, dtype: torch.dtype, factors: torch.dtype) -> None:
    """Call three projections of one input together, two of them a quarter as wide, and differentiate them together."""
    widths = {"q_proj": shape.n, "k_proj": max(1, shape.n // 4), "v_proj": max(1, shape.n // 4)}
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(shape.k, n, name != "k_proj", NOWHERE, dtype) for name, n in widths.items()}
    )
    config = pk.PLoRAConfig(rank=shape.r, target_modules=list(widths), fuse_projections=True, adapter_dtype=factors)
    handle = pk.inject(model, config)
    x = torch.empty(shape.m, shape.k, dtype=dtype, device=NOWHERE, requires_grad=True)
    ys = [layer(x) for layer in handle.layers.values()]
    torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])


def shape_jobs(shapes: Iterable[Shape], dtypes: Sequence[str], targets: Sequence[Target]) -> Iterator[Job]:
    """Yield the defaults of every shape, and with float32 factors those of MIXED_SHAPES among them."""
    for shape, dtype, target in product(shapes, dtypes, targets):
        yield Job(shape, dtype, target)
        if dtype in HALF and shape in MIXED_SHAPES:
            yield Job(shape, dtype, target, mixed=True)


def design_jobs(dtypes: Sequence[str], targets: Sequence[Target]) -> Iterator[Job]:
    """Yield every design that is a candidate on a target, with each of its kinds of overlap.

    Each kernel design comes once with float32 factors too.
    """
    for target, shape, dtype, design in product(targets, DESIGN_SHAPES, dtypes, DESIGNS):
        for way, blocks in design_ways(design, shape, dtype, target.hardware).items():
            job = Job(shape, dtype, target, way, tuple(blocks.items()), candidate=True)
            yield job
            if dtype in HALF and shape == DESIGN_SHAPES[0] and way == design and design in KERNEL_DESIGNS:
                yield replace(job, mixed=True)


def table_jobs(targets: Sequence[Target], folder: Path = PACKAGED, *, mixed: bool = True) -> Iterator[Job]:
    """Yield the entries of the packaged tables, on the target their device belongs to.

    If `mixed`, different blocks of kernels that load factors come once with float32 factors too.
    """
    for path in sorted(folder.glob("*.json")):
        table = load_table(path)
        for target in targets:
            if table.meta.get("capability") != target.capability:
                continue
            known: set[tuple[str, str, Blocks]] = set()
            for entry in table.entries:
                op, dtype = entry.shape.op, entry.shape.dtype
                job = Job(_layer(entry.shape), dtype, target, path.stem, ((op, entry.blocks),))
                yield job
                if mixed and dtype in HALF and op in LOADING_FACTORS and (op, dtype, entry.blocks) not in known:
                    known.add((op, dtype, entry.blocks))
                    yield replace(job, mixed=True)


def _layer(shape: ShapeClass) -> Shape:
    """Return a layer whose `shape.op` has these sizes."""
    if shape.op == "fold":
        return Shape(128, shape.d_in, shape.d_out, shape.r)
    if shape.op in ("side_product", "factor_gradient"):  # of any number of outputs
        return Shape(shape.m, shape.d_in, shape.d_in, shape.r)
    if shape.op == "forward":
        return Shape(shape.m, shape.d_in, shape.d_out, shape.r)
    return Shape(shape.m, shape.d_out, shape.d_in, shape.r)


def audit_job(job: Job) -> list[Row]:
    """Compile all launches of a job and read the machine code; a failure becomes a row with the error."""
    settle_compilers()
    failed = []
    with compiling_for(job.target) as launches, override_blocks(dict(job.blocks)):
        try:
            dtype = getattr(torch, job.dtype)
            for run in (run_shape, run_projections, run_groups):
                run(job.shape, dtype, torch.float32 if job.mixed else dtype)
        except Exception as error:  # any error of the compiler is a result
            last = f"after {launches[-1].kernel}" if launches else "the first"
            failed.append(Row(last, job.case, job.target.name, error=one_line(error)))
    return [row_of(launch, job) for launch in launches] + failed


def row_of(launch: Launch, job: Job) -> Row:
    """Return the figures of a compiled launch."""
    row = Row(launch.kernel, job.case, job.target.name, launch.compiled.hash[:12], job.candidate)
    if is_trap(launch.compiled):
        return replace(row, error="compiles to a trap")
    usage, limits = usage_of(launch.compiled), LIMITS[job.target.name]
    return replace(
        row,
        **asdict(usage),
        shared_limit_bytes=limits.shared_bytes_a_block,
        blocks_resident=resident_blocks(usage, launch.num_warps, limits),
        instructions=instructions_of(launch.compiled),
    )


def audit(jobs: Sequence[Job], workers: int) -> list[Row]:
    """Return the rows of all jobs in their order, each machine code once; a dot on stderr for each job."""
    found: dict[int, list[Row]] = {}
    for position, outcome in outcomes(audit_job, jobs, workers=workers, seconds_each=SECONDS_EACH):
        job = jobs[position]
        lost = [Row("-", job.case, job.target.name, error=outcome.error)]
        found[position] = outcome.value if outcome.error is None else lost
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    rows: dict[tuple[str, str | None], Row] = {}
    for position in sorted(found):
        for row in found[position]:
            rows.setdefault((row.code or row.case, row.error), row)
    return list(rows.values())
