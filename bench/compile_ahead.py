"""Compile the kernels of a run on a GPU without that GPU, into a Triton cache that the run then uses.

`python -m bench.compile_ahead CACHE_DIR --check-dtypes bfloat16 --cases 12 --classes 5` runs what `python -m bench.gpu`
checks and times and `python -m bench.tune` tries, on tensors without storage, in as many processes as there are cores;
`--sitting first` what `python -m bench.sitting first` has these do. On the device set TRITON_CACHE_DIR=CACHE_DIR.

A kernel is found where these are the same: Triton's files, the version of its ptxas, the kernel's source and line,
what arguments are specialised on, constants and options. Neither the folder of the code nor the machine counts, but
files of a cache name each other by absolute paths: carry CACHE_DIR to the same path, or `--pack FILE` here and
`--unpack FILE` there, which writes the paths anew. A kernel that is not found is compiled as usual, so a cache made by
another Triton, or for other blocks or other sources, is of no use and does no harm. Only binaries are kept
(TRITON_STORE_BINARY_ONLY), not the texts they were compiled from.

Kernels are compiled with default blocks and candidates, not with those of tables; every entry that a tuner writes into
a table was one of the candidates.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import gpu
from bench.audit.jobs import SECONDS_EACH
from bench.audit.machine_code import Usage, is_trap, usage_of
from bench.audit.offline import NOWHERE, TARGETS, Launch, Target, compiling_for, refuse_interpreter
from bench.cases import Case
from bench.checks.inputs import DTYPES, CheckShape
from bench.checks.operators import check_shapes, run_each_form
from bench.device.state import check_title
from bench.gpu_cases import device_cases
from bench.harness.machine import settle_compilers, usable_cores
from bench.harness.processes import one_line, outcomes
from bench.measure import Warmup, warm_up
from bench.providers.registry import PROVIDERS, is_ours
from bench.sitting import LIMITS as SITTINGS
from bench.sitting import plan
from bench.tune import command
from bench.tune.classes import shape_classes
from bench.tune.search import narrowed
from bench.tune.trials import Trial, for_checking, make_trial
from bench.tune.tuner import Attempt
from plora_kernels.tuning.blocks import ShapeClass
from plora_kernels.tuning.candidates import candidates

OURS = tuple(filter(is_ours, PROVIDERS))
# The beginning of the name of a file that lists a cached kernel's files by absolute paths.
GROUP = "__grp__"
# The ending of a kernel's source text, which a cache holds beside the binaries and nothing reads.
UNREAD = ".source"


# The figures of kernels by their hash, because reading each one starts a tool of CUDA.
_USAGE: dict[str, Usage] = {}
# A shape with all its forms, a case with this library's providers, or a candidate, which the tuner checks on fewer rows
# and then times.
Piece = CheckShape | Warmup | Attempt


def name_of(piece: Piece) -> str:
    """Return a description of a piece."""
    match piece:
        case CheckShape():
            return f"check {check_title(piece)}"
        case Warmup(case=case):
            return f"case {case.op} {case.name}"
        case Attempt(shape=shape, blocks=blocks):
            return f"candidate {shape} {blocks}"


@dataclass
class Found:
    """The launches of pieces: kernels by the hash of their cache entry, with their piece; their figures; failures."""

    kernels: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Usage] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def pieces(options: argparse.Namespace, target: Target) -> list[Piece]:
    """List what the options choose: checks, cases, candidates of classes, then defaults of the other classes."""
    what = _of_sitting(options.sitting, target) if options.sitting is not None else []
    what += _checks(shape for shape in check_shapes("cuda") if shape.dtype in options.check_dtypes)
    what += _cases(device_cases("cuda")[: options.cases])
    for number, shape in enumerate(shape_classes("cuda")):
        what += _candidates(shape, target, options.candidates if number < options.classes else int(options.defaults))
    return list(dict.fromkeys(what))


def _of_sitting(name: str, target: Target) -> list[Piece]:
    """List what the steps of a sitting check, time and try, as their own commands choose it."""
    found: list[Piece] = []
    for step in plan(name, Path(), "cuda"):
        if step.module == "bench.gpu":
            work = gpu.choose_work(gpu.parse(step.arguments))
            found += [*_checks(work.first_checks), *_cases(work.cases), *_checks(work.last_checks)]
        elif step.module == "bench.tune":
            options = command.parse(step.arguments)
            for shape in command.choose_classes(options):
                found += _candidates(shape, target, options.candidates)
    return found


def _checks(shapes: Iterable[CheckShape]) -> list[Piece]:
    return [replace(shape, device=NOWHERE.type) for shape in shapes]


def _cases(cases: Iterable[Case]) -> list[Piece]:
    return [Warmup(case, NOWHERE.type, OURS) for case in cases]


def _candidates(shape: ShapeClass, target: Target, most: int) -> list[Piece]:
    tried = narrowed(shape, candidates(shape, target.hardware), {}, most)
    return [Attempt(shape, blocks, NOWHERE.type) for blocks in tried]


def compile_piece(piece: Piece, *, target: Target, with_usage: bool) -> Found:
    """Compile all launches of a piece; failures are part of the result."""
    name = name_of(piece)
    with compiling_for(target) as launches:
        failed = [f"{name}: {cause}" for cause in _causes(piece)]
    failed += [f"{name}: {one.kernel} compiles to a trap" for one in launches if is_trap(one.compiled)]
    kernels = {launch.compiled.hash: f"{launch.kernel} of {name}" for launch in launches}
    usage = _usage(launches) if with_usage else {}
    return Found(kernels, usage, failed)


def _causes(what: Piece) -> Iterator[str]:
    """Run a piece and yield the causes of what fails."""
    match what:
        case CheckShape():
            for form, error in run_each_form(what):
                if error is not None:
                    yield f"{form}: {_cause(error)}"
        case Warmup():
            for name, cause in warm_up(what).items():
                yield f"{name}: {cause}"
        case Attempt(shape=shape, blocks=blocks):
            try:
                _trial(for_checking(shape)).check(blocks)
                _trial(shape).with_blocks(blocks)()
            except Exception as error:  # any error of the compiler is a result
                yield _cause(error)


@functools.lru_cache(maxsize=2)
def _trial(shape: ShapeClass) -> Trial:
    return make_trial(shape, NOWHERE)


def _cause(error: Exception) -> str:
    return "; ".join([one_line(error), *getattr(error, "__notes__", ())])


def _usage(launches: Sequence[Launch]) -> dict[str, Usage]:
    for launch in launches:
        if launch.compiled.hash not in _USAGE:
            _USAGE[launch.compiled.hash] = usage_of(launch.compiled)
    return {launch.compiled.hash: _USAGE[launch.compiled.hash] for launch in launches}


def compile_all(what: Sequence[Piece], target: Target, options: argparse.Namespace) -> Found:
    """Compile the pieces in processes of their own, with a line for each, and return all their launches."""
    all_of_them, started = Found(), time.monotonic()
    compiled = functools.partial(compile_piece, target=target, with_usage=options.spills)
    answers = outcomes(compiled, what, workers=options.workers, seconds_each=SECONDS_EACH)
    for count, (position, outcome) in enumerate(answers, 1):
        name = name_of(what[position])
        found = outcome.value or Found(failed=[f"{name}: {outcome.error}"])
        new = found.kernels.keys() - all_of_them.kernels.keys()
        all_of_them.kernels = found.kernels | all_of_them.kernels
        all_of_them.usage |= found.usage
        all_of_them.failed += found.failed
        seconds = time.monotonic() - started
        kernels = f"{len(found.kernels)} kernels, {len(new)} of them new"
        print(f"{seconds:6.1f} s  [{count}/{len(what)}] {name}: {kernels}", flush=True)
        for cause in found.failed:
            print(f"    FAILED {cause}", flush=True)
    return all_of_them


def size_mb(folder: Path) -> float:
    """Return the size of the files in a folder, in 10⁶ bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def pack(cache: Path, file: Path) -> None:
    """Write the files of a cache that Triton reads to a compressed tar."""
    with tarfile.open(file, "w:gz") as archive:
        for path in sorted(cache.rglob("*")):
            if path.is_file() and path.suffix != UNREAD:
                archive.add(path, path.relative_to(cache).as_posix())


def unpack(file: Path, cache: Path) -> None:
    """Unpack a cache into a folder, and correct the paths in its group files."""
    with tarfile.open(file) as archive:
        archive.extractall(cache, filter="data")
        groups = [cache / name for name in archive.getnames() if Path(name).name.startswith(GROUP)]
    for group in groups:
        names = [name for name in json.loads(group.read_text())["child_paths"] if (group.parent / name).is_file()]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))


def settle_cache(cache: Path) -> None:
    """Make Triton in this process and its children compile into a folder, with the same keys on every machine."""
    settle_compilers()
    os.environ.update(TRITON_CACHE_DIR=str(cache), TRITON_STORE_BINARY_ONLY="1")


def fill(options: argparse.Namespace) -> int:
    """Compile what the options choose and print a summary; return 1 if something does not compile."""
    import triton

    target = TARGETS[options.target]
    if options.multiprocessors is not None:
        target = replace(target, multiprocessors=options.multiprocessors)
    started = time.monotonic()
    found = compile_all(pieces(options, target), target, options)
    for key, usage in sorted(found.usage.items(), key=lambda item: -item[1].spill_bytes):
        if usage.spill_bytes:
            figures = f"{usage.spill_bytes} bytes a thread, {usage.registers} registers"
            print(f"    SPILLS {found.kernels[key]}: {figures}")
    if options.pack is not None:
        pack(options.cache, options.pack)
        print(f"{options.pack}: {options.pack.stat().st_size / 1e6:.1f} MB")
    versions = f"Triton {triton.__version__}, Python {platform.python_version()}, {target.name}"
    what = f"{len(found.kernels)} kernels for {versions}, {target.multiprocessors} multiprocessors"
    seconds = time.monotonic() - started
    print(
        f"{options.cache}: {what}; {size_mb(options.cache):.1f} MB, {len(found.failed)} failures, {seconds:.0f} s",
        flush=True,
    )
    return 1 if found.failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_ahead", description=__doc__)
    parser.add_argument("cache", type=Path, metavar="CACHE_DIR", help="what is TRITON_CACHE_DIR on the device")
    parser.add_argument("--target", default="sm_90", choices=list(TARGETS))
    parser.add_argument("--multiprocessors", type=int, help="of the device, which persistent launches are sized to")
    parser.add_argument("--sitting", choices=list(SITTINGS), help="what this sitting checks, times and tries")
    parser.add_argument("--check-dtypes", nargs="+", default=[], choices=list(DTYPES), help="checks in these dtypes")
    parser.add_argument("--cases", type=int, default=0, help="how many of the cases that are timed, the first ones")
    parser.add_argument("--classes", type=int, default=0, help="how many of the tuner's classes, the first ones")
    parser.add_argument("--candidates", type=int, default=96, help="how many of a class, as many as the tuner tries")
    parser.add_argument("--defaults", action="store_true", help="the other classes too, with their default alone")
    parser.add_argument("--spills", action="store_true", help="say which kernels spill registers")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes to compile in (0: this one)")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the whole folder to this .tar.gz at the end")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="compile nothing: put such a file into the folder")
    options = parser.parse_args(arguments)
    if options.spills and TARGETS[options.target].backend != "cuda":
        parser.error(f"--spills reads cubins, of which {options.target} has none")
    options.cache = options.cache.absolute()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 1 if something does not compile, 2 for invalid input."""
    options = parse(arguments)
    if options.unpack is not None:
        try:
            unpack(options.unpack, options.cache)
        except (OSError, tarfile.TarError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{options.cache}: {size_mb(options.cache):.1f} MB")
        return 0
    if refuse_interpreter():
        return 2
    settle_cache(options.cache)
    return fill(options)


if __name__ == "__main__":
    raise SystemExit(main())
