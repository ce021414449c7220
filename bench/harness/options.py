"""Options that several command lines share, their types, and the exit status of errors."""

import argparse
import re
import sys
import time
from collections.abc import Callable

import torch

from bench.harness.machine import measure_kernels
from bench.harness.records import ResultsError
from plora_kernels.errors import ConfigError


def at_least(least: int, text: str) -> int:
    """Return a whole number; raise an error that argparse reports if it is smaller than `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)


def sizes(names: str, example: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a text like `example`, "4096x4096"; other text raises an error that argparse reports."""
    if not re.fullmatch("x".join([r"[1-9]\d*"] * len(example.split("x"))), text):
        raise argparse.ArgumentTypeError(f"{text!r} is not {names} as in {example}")
    return tuple(map(int, text.split("x")))


def add_device_options(parser: argparse.ArgumentParser, *, seconds: float, fresh: str, workers: bool = True) -> None:
    """Add the options of commands that measure the present device for a limited time and continue in the next call.

    Time counts from this call on: `started` is a `time.monotonic()`.
    """
    parser.set_defaults(started=time.monotonic())
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"], help="the CPU tries it out on tiny sizes")
    parser.add_argument("--budget-seconds", type=float, default=seconds, help="end by then; another call goes on")
    parser.add_argument("--fresh", action="store_true", help=fresh)
    if workers:
        parser.add_argument("--workers", type=int, help="processes that check and compile ahead (0: none)")
    parser.add_argument("--commit", help="what to call the code where git does not know")


def status_on_device(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Return `exit_status` of what measures kernels on the device of `options`; 2 if there is no such device."""
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("error: there is no CUDA device; --device cpu tries the command out", file=sys.stderr)
            return 2
        measure_kernels()
    return exit_status(run, options)


def exit_status(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Return the exit status of `run`; for invalid input 2, with a line on stderr."""
    try:
        return run(options)
    except (ResultsError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
