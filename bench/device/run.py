"""A run of `python -m bench.gpu`: checks, compiling ahead and timing, their order and time limits.

Other processes do all work on the device. If one crashes, hangs or loses its device, only the provider that ran in it
is lost; what is not done at the end of a stage's time is stopped and left out.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from bench.cases import Case
from bench.checks.operators import check_record
from bench.device.jobs import Check, Timing, perform
from bench.device.simulations import time_models, time_simulations
from bench.device.state import LEAST_SECONDS, Run, Work, check_title, title, unchecked
from bench.harness.processes import Outcome, Workers
from bench.harness.records import Record, case_key
from bench.measure import Warmup, chosen_providers, status_of_lost, untimed

# A piece of work that takes longer is stopped: checking a shape or compiling a case, and timing one.
AHEAD_SECONDS, TIMING_SECONDS = 90.0, 60.0
# The share of the whole time that is kept for training steps, while some are missing.
SIMULATION_SHARE = 0.4
# The share of the time left for cases that compiling a chunk of them ahead may take.
AHEAD_SHARE = 0.6
# How many cases are compiled ahead before they are timed; small chunks, so that an interrupted run has timed some.
CHUNK, COMPILED_CHUNK = 24, 10
# Providers that are timed in every loop, because the others' times are divided by theirs.
REFERENCES = ("base", "peft")
# The provider that takes long to compile: it is compiled and timed after all others.
COMPILED = "peft-compiled"


def do(run: Run, work: Work) -> None:
    """Check what is timed first, time, measure training steps, check the rest: each until its time is up.

    Whole models are the last that is timed.
    """
    steps = any(run.missing_steps(case) for case in work.steps)
    cases_end = run.end - (SIMULATION_SHARE * (run.end - run.started) if steps else 0.0)
    answer = partial(perform, defaults=run.defaults)
    ahead, timer = Workers(answer, run.workers, AHEAD_SECONDS), Workers(answer, min(run.workers, 1), TIMING_SECONDS)
    with ahead, timer:
        checks: list[Check | Warmup] = [*unchecked(run, work.first_checks)]
        for count, (cases, compiled) in enumerate(_chunks(run, work.cases)):
            if count == 0:
                timer.start()  # it starts while the first cases are compiled
            prepare(run, ahead, [*checks, *_warmups(run, cases, compiled)], _ahead_end(cases_end))
            checks = []
            time_cases(run, timer, cases, compiled, cases_end)
            if time.monotonic() > cases_end:
                break
        prepare(run, ahead, checks, _ahead_end(cases_end))
    # Training steps need the memory that other processes hold.
    time_simulations(run, work.simulations)
    time_models(run, work.models)
    rest = unchecked(run, [*work.first_checks, *work.last_checks])
    with Workers(answer, min(run.workers, len(rest)), AHEAD_SECONDS) as workers:
        prepare(run, workers, rest, run.end)


def _ahead_end(cases_end: float) -> float:
    now = time.monotonic()
    return now + AHEAD_SHARE * (cases_end - now)


def _chunks(run: Run, cases: Sequence[Case]) -> Iterator[tuple[list[Case], bool]]:
    """Yield cases to compile and then time together, and whether their `torch.compile`d providers are meant.

    Cases like the first one come first, then the others in order, and `torch.compile`d providers last.
    """
    like_first = [case for case in cases if _shape(case) == _shape(cases[0])]
    others = [case for case in cases if case not in like_first]
    for compiled, size in ((False, CHUNK), (True, COMPILED_CHUNK)):
        parts = [like_first] + [others[start : start + size] for start in range(0, len(others), size)]
        for part in parts:
            todo = [case for case in part if _wanted(run, case, compiled)]
            if todo:
                yield todo, compiled


def _shape(case: Case) -> tuple[object, ...]:
    return case.projection.k, case.projection.n, case.r, case.dtype


def _wanted(run: Run, case: Case, compiled: bool) -> tuple[str, ...]:
    """Return the providers of a case that are missing: the compiled one, or all others."""
    return tuple(name for name in run.missing(case) if (name == COMPILED) is compiled)


def _warmups(run: Run, cases: Sequence[Case], compiled: bool) -> list[Warmup]:
    if not run.workers:  # without workers each case is compiled when it is timed
        return []
    return [Warmup(case, run.device, _wanted(run, case, compiled)) for case in cases]


def prepare(run: Run, workers: Workers, work: Sequence[Check | Warmup], end: float) -> None:
    """Check shapes and, in the same processes, run providers once; record what is wrong."""
    items = list(work)
    for position, outcome in workers.outcomes(items, end - LEAST_SECONDS, end):
        item = items[position]
        again = _checked(run, item, outcome) if isinstance(item, Check) else _warmed(run, item, outcome)
        if again is not None:
            items.append(again)


def _checked(run: Run, item: Check, outcome: Outcome) -> Check | None:
    """Record the results of a shape's forms; if one of them ended the process, return those that are left."""
    records = list(outcome.value if outcome.value is not None else outcome.notes)
    forms = item.forms[len(records) :]
    if forms and not outcome.cut:
        records.append(check_record(item.shape, forms[0]) | {"status": "wrong", "cause": outcome.error})
        forms = forms[1:]
    run.file.add(records)
    wrong = [record for record in records if record["status"] == "wrong"]
    run.say(f"check {check_title(item.shape)}: {len(records) - len(wrong)} of {len(records)} forms right")
    for record in wrong:
        run.say(f"    WRONG {record['form']}: {record['cause']}")
    return replace(item, forms=forms) if forms and not outcome.cut else None


def _warmed(run: Run, item: Warmup, outcome: Outcome) -> Warmup | None:
    """Exclude providers that failed from timing; if one of them ended the process, return those that are left."""
    if outcome.cut:
        return None
    if outcome.value is not None:
        _note_failures(run, item.case, outcome.value)
        return None
    ran = outcome.last_note
    if ran is None:  # its tensors could not be drawn; timing it will fail too, and record that
        run.say(f"    {title(item.case)} did not warm up: {outcome.error}")
        return None
    _note_failures(run, item.case, {ran: str(outcome.error)})
    names = chosen_providers(item.case, item.providers)
    rest = tuple(name for name in names[names.index(ran) + 1 :] if name in item.providers)
    return replace(item, providers=rest) if rest else None


def _note_failures(run: Run, case: Case, failed: Mapping[str, str]) -> None:
    if failed:
        run.failed.setdefault(case_key(case.facts()), {}).update(failed)
        run.say(f"    FAILED {title(case)}: " + "; ".join(f"{name}: {cause}" for name, cause in failed.items()))


def time_cases(run: Run, timer: Workers, cases: Sequence[Case], compiled: bool, end: float) -> None:
    """Time what is missing of some cases in order, until the time is up."""
    items: list[Timing] = []
    for case in cases:
        _queue(run, items, case, _wanted(run, case, compiled))
    for position, outcome in timer.outcomes(items, end - LEAST_SECONDS, end):
        item = items[position]
        if outcome.cut:
            continue
        wanted = _wanted(run, item.case, compiled)
        ran = outcome.last_note
        if outcome.value is None and ran is not None:
            _note_failures(run, item.case, {ran: str(outcome.error)})
            _queue(run, items, item.case, wanted)
            continue
        if outcome.value is None:
            records = [_untimed(item, name, f"{outcome.error}, while nothing ran alone") for name in wanted]
        else:
            records = [record for record in outcome.value if record["provider"] in wanted]
        run.file.add(records)
        _show(run, f"[{position + 1}/{len(items)}] {title(item.case)}", records)


def _queue(run: Run, items: list[Timing], case: Case, wanted: Sequence[str]) -> None:
    """Add the timing of a case's providers, with those they are divided by; record those that would only fail again."""
    failed = {
        name: str(record["cause"])
        for name, record in run.file.of_case(case.facts()).items()
        if name in REFERENCES and record["status"] != "timed"
    }
    failed |= run.failed.get(case_key(case.facts()), {})
    names = chosen_providers(case, REFERENCES + tuple(wanted))
    item = Timing(case, run.device, run.plan, names, {name: why for name, why in failed.items() if name in names})
    if set(wanted) <= set(item.failed):
        records = [_untimed(item, name, item.failed[name]) for name in wanted]
        run.file.add(records)
        _show(run, title(case), records)
    else:
        items.append(item)


def _untimed(item: Timing, name: str, cause: str) -> Record:
    """Return the record of a provider whose process ended before it was timed."""
    return untimed(item.case, item.device, name, status_of_lost(name), cause)


def _show(run: Run, name: str, records: Sequence[Record]) -> None:
    figures = (
        f"{record['provider']} {record['time_ms']:.4g}" if record["time_ms"] else f"{record['provider']} –"
        for record in records
    )
    run.say(f"{name}: {', '.join(figures)} ms")
    for record in records:
        if record["status"] == "wrong":
            run.say(f"    WRONG {record['provider']}: {record['cause']}")
