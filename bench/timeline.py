"""When each kernel of a layer's call runs on the device, and how much of it runs beside others.

`python -m bench.timeline --out DIR` profiles the most important layer (forward alone, then forward and backward, then
both with LoRA dropout) and writes DIR/timeline/<device>.json: for each kernel its start, from that of the first one on,
and its duration, in µs and as medians over calls. It prints them with bars. As in `bench.gpu`, results are checked
against float64 first, the cache is flushed before a call, and the device kept busy until the host has launched it. On
the CPU operators take the kernels' place.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import Case, make_problem
from bench.gpu_cases import TIMELINE_CASES, TINY
from bench.harness.machine import RESERVE_SECONDS, describe, device_slug, settle_compilers, tables_digest
from bench.harness.options import add_device_options, at_least, status_on_device
from bench.harness.processes import leave
from bench.harness.records import ResultsError, blank, open_records
from bench.harness.timing import cache_flush, host_seconds, lead_seconds
from bench.measure import WRONG, Exclusions, right_providers
from bench.providers.base import Provider
from bench.providers.registry import PROVIDERS

OP = "timeline"
BAR_COLUMNS = 40


@dataclass(frozen=True)
class Span:
    """A kernel of a call: its name, start and duration in µs, and the part of the duration beside other kernels."""

    kernel: str
    start_us: float
    duration_us: float
    beside: float = 0.0

    @property
    def end_us(self) -> float:
        """When it ends, in µs."""
        return self.start_us + self.duration_us


def median_call(calls: Sequence[Sequence[Span]]) -> list[Span]:
    """Return the kernels of a call: medians over `calls`, counted from the first start.

    Raises ResultsError if the calls do not launch the same kernels in the same order.
    """
    names = [[span.kernel for span in call] for call in calls]
    if not names or not names[0] or any(other != names[0] for other in names):
        counts = ", ".join(str(len(call)) for call in names)
        raise ResultsError(f"the profiled calls should launch the same kernels; they launched {counts or 'none'}")
    firsts = [min(span.start_us for span in call) for call in calls]
    found = []
    for position, name in enumerate(names[0]):
        starts = [call[position].start_us - first for call, first in zip(calls, firsts, strict=True)]
        durations = [call[position].duration_us for call in calls]
        found.append(Span(name, statistics.median(starts), statistics.median(durations)))
    return [Span(one.kernel, one.start_us, one.duration_us, _beside(one, found)) for one in found]


def _beside(span: Span, spans: Sequence[Span]) -> float:
    """Return the part of a span's duration in which at least one other span runs."""
    covered, reached = 0.0, span.start_us
    for other in sorted(spans, key=lambda one: one.start_us):
        if other is not span and other.end_us > reached and other.start_us < span.end_us:
            begin, reached = max(reached, other.start_us), min(other.end_us, span.end_us)
            covered += max(0.0, reached - begin)
    return covered / span.duration_us if span.duration_us else 0.0


def profiled(run: Callable[[], object], device: torch.device) -> list[Span]:
    """Run a call once under torch's profiler; return its kernels by their start, on the CPU its outermost operators."""
    on_device = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU], acc_events=True) as found:
        run()
        if on_device:
            torch.cuda.synchronize()
    events = [
        event
        for event in found.events()
        if (event.device_type is torch.autograd.DeviceType.CUDA if on_device else event.cpu_parent is None)
    ]
    spans = [Span(event.name, event.time_range.start, event.time_range.elapsed_us()) for event in events]
    return sorted(spans, key=lambda span: span.start_us)


def timeline(provider: Provider, device: torch.device, calls: int) -> list[Span]:
    """Return when the kernels of a provider's call run, of which `calls` are profiled."""
    step = provider.step
    for _ in range(3):  # compile, record, replay
        step.reset()
        step.run()
    host_s = [host_seconds(step)] if device.type == "cuda" else []
    flush = cache_flush(device, cold=False, lead_s=lead_seconds(host_s))
    profiled(step.run, device)  # the first use of the profiler takes seconds
    before = len(profiled(flush, device)) if device.type == "cuda" else 0

    def flushed() -> None:
        flush()
        step.run()

    found = []
    for _ in range(calls):
        step.reset()
        found.append(profiled(flushed if before else step.run, device)[before:])
    return median_call(found)


def picture(spans: Sequence[Span]) -> str:
    """Return a line for each kernel: its start, duration, the part beside others, a bar and its name."""
    whole = max(span.end_us for span in spans) or 1.0
    lines = [f"{'start µs':>9} {'µs':>8} {'beside':>7}  {'':<{BAR_COLUMNS}}  kernel"]
    for span in spans:
        first = min(BAR_COLUMNS - 1, int(span.start_us / whole * BAR_COLUMNS))
        length = max(1, round(span.duration_us / whole * BAR_COLUMNS))
        bar = (" " * first + "#" * length)[:BAR_COLUMNS]
        figures = f"{span.start_us:>9.1f} {span.duration_us:>8.1f} {span.beside:>7.0%}"
        lines.append(f"{figures}  {bar:<{BAR_COLUMNS}}  {span.kernel[:40]}")
    return "\n".join(lines)


def profile_device(options: argparse.Namespace) -> int:
    """Profile every case and provider that has no record yet, as time allows; return 1 if a result was wrong."""
    device = torch.device(options.device)
    path = options.out / "timeline" / f"{device_slug(device)}.json"
    stamp = {"tables": tables_digest()}
    file = open_records(path, describe(device, options.commit), fresh=options.fresh, stamp=stamp)
    end, left, wrong = options.started + options.budget_seconds - RESERVE_SECONDS, 0, 0
    for case, name in _choose(options):
        facts: dict[str, Any] = case.facts() | {"op": OP, "form": case.op}
        title = f"{case.op} {case.m} {case.projection.k} {case.projection.n} {case.r} {case.dtype}, {name}"
        if name in file.of_case(facts):
            continue
        if time.monotonic() > end:
            left += 1
            continue
        excluded = Exclusions(device)
        provider = right_providers(case, make_problem(case, device), [name], excluded).get(name)
        if provider is None:
            status, cause = excluded.causes[name]
            wrong += status == WRONG
            print(f"{status.upper()} {title}: {cause}", flush=True)
            continue
        spans = timeline(provider, device, options.calls)
        whole_us = max(span.end_us for span in spans)
        kernels = [asdict(span) for span in spans]
        file.add([blank(**facts, provider=name, time_ms=whole_us / 1e3, kernels=kernels, status="profiled")])
        print(f"{title}:\n{picture(spans)}\n", flush=True)
    print(f"{path}: {len(file.records)} records, {wrong} wrong, {left} left")
    return 1 if wrong else 0


def _choose(options: argparse.Namespace) -> list[tuple[Case, str]]:
    """Return the cases and providers to profile, the most important ones first."""
    if options.device == "cpu":
        return [(Case("forward_backward", TINY, 32, 4, "float32"), name) for name in options.providers]
    return [(case, name) for case in TIMELINE_CASES[: options.cases] for name in options.providers]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(prog="python -m bench.timeline", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where timeline/<device>.json goes")
    add_device_options(parser, seconds=60.0, fresh="start over instead of going on", workers=False)
    parser.add_argument("--cases", type=partial(at_least, 1), metavar="N", help="profile only the first N cases")
    parser.add_argument("--providers", nargs="+", default=["fused", "inplace"], choices=PROVIDERS)
    parser.add_argument("--calls", type=partial(at_least, 1), default=12, metavar="N", help="profile N calls each")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, 2 for invalid input."""
    settle_compilers()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes lines of its own to stderr
    return status_on_device(profile_device, parse(arguments))


if __name__ == "__main__":
    leave(main())
